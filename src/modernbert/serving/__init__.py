"""A server for models: `modernbert serve`, `create_app` for a server of your own, or `ray_app` for a cluster."""

from modernbert.lazy import exports

__all__ = ["ReplicaOptions", "ServeOptions", "create_app", "ray_app"]

_EXPORTS = {
    "create_app": "serving.app",
    "ray_app": "serving.replicas",
    "ReplicaOptions": "serving.replicas",
    "ServeOptions": "serving.options",
}
__getattr__, __dir__ = exports(__name__, _EXPORTS)
