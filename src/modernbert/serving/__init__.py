"""A server for models: `modernbert serve`, or `create_app` for a server of your own."""

from modernbert.lazy import exports

__all__ = ["ServeOptions", "create_app"]

__getattr__, __dir__ = exports(__name__, {"create_app": "serving.app", "ServeOptions": "serving.options"})
