// Swagger UI over this server's schema. The address is relative, so that it holds below any root path.
"use strict";

SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#docs",
  deepLinking: true,
  validatorUrl: null, // by default the schema is sent to a service that checks it
});
