"""Models as files of ONNX and OpenVINO, in folders that other libraries read."""

from modernbert.lazy import exports

_EXPORTS = {
    "ExportOptions": "interop.exporting.options",
    "ExportReport": "interop.exporting.run",
    "ExportedFile": "interop.exporting.run",
    "export": "interop.exporting.run",
}
__getattr__, __dir__ = exports(__name__, _EXPORTS)
__all__ = ["ExportOptions", "ExportReport", "ExportedFile", "export"]
