"""The page at ``/`` and the API's at ``/docs``: files of the package, the same for everyone."""
