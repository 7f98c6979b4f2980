// Swagger's view of the server's own document, with the key that the page at / uses.

import { call, key } from "./api.js";
import { by } from "./dom.js";

async function draw() {
  try {
    const spec = await call("GET", "openapi.json");
    by("problem").textContent = "";
    by("key-form").hidden = true;
    SwaggerUIBundle({
      spec,
      dom_id: "#api",
      deepLinking: true,
      docExpansion: "list",
      defaultModelsExpandDepth: 0,
      validatorUrl: null,
      requestInterceptor: (request) => {
        if (key.get()) request.headers.Authorization = `Bearer ${key.get()}`;
        return request;
      },
    });
  } catch (error) {
    by("problem").textContent = error.message;
    if (error.status === 401) by("key-form").hidden = false;
  }
}

by("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(by("key").value.trim());
  by("key").value = "";
  draw();
});
draw();
