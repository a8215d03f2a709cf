"""Labels over HTTP.

Run:  pip install fastapi uvicorn python-multipart
      MODEL=runs/NAME/best uvicorn fastapi_service:app --app-dir examples
Ask:  curl -F image=@photo.jpg localhost:8000/predict
"""

import io
import os

from fastapi import FastAPI, HTTPException, UploadFile
from PIL import Image, UnidentifiedImageError

import mlfast
from mlfast.data.images import ImageError

MOST_BYTES = 20_000_000

app = FastAPI(title="mlfast")
predictor = mlfast.Predictor(os.environ["MODEL"], max_pixels=25_000_000)


@app.get("/labels")
def labels() -> dict[str, float]:
    """Every label with its threshold."""
    return dict(zip(predictor.classes, predictor.thresholds.tolist(), strict=True))


@app.post("/predict")
def predict(image: UploadFile) -> dict[str, float]:  # not async: FastAPI gives each call a thread
    """The labels of an image with their probabilities."""
    data = image.file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise HTTPException(413, f"more than {MOST_BYTES:,} bytes")
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return predictor(picture).labels
    except (ImageError, UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise HTTPException(422, str(error)) from error
