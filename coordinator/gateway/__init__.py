"""Models for any OpenAI client: `make_app` over what generates, `serve` to listen."""

from isthmus.coordinator.gateway.api import make_app
from isthmus.coordinator.gateway.models import ServedModel
from isthmus.coordinator.gateway.server import HttpServer, serve

__all__ = ["HttpServer", "ServedModel", "make_app", "serve"]
