"""From a trained model to answers: predict, choose thresholds, export to ONNX and OpenVINO."""

from mlfast.deploy.export import Export, export_model
from mlfast.deploy.predictor import Prediction, Predictor

__all__ = ["Export", "Prediction", "Predictor", "export_model"]
