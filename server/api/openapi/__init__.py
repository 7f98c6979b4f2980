"""The OpenAPI document of this server, made from its routes and the schemas that check its bodies."""
