"""A page to try a model on.

Run: pip install gradio
     python examples/gradio_page.py runs/NAME/best
"""

import sys

import gradio

import mlfast


def page(model):
    """The page for a model folder or exported file."""
    predictor = mlfast.Predictor(model)

    def predict(image, threshold):
        if image is None:
            return {}
        prediction = predictor(image)  # uint8 [H, W, 3]
        if threshold == 0:  # the tuned ones
            return prediction.labels
        scores = zip(predictor.classes, prediction.probabilities.tolist(), strict=True)
        return {name: score for name, score in scores if score >= threshold}

    return gradio.Interface(
        predict,
        inputs=[gradio.Image(), gradio.Slider(0, 1, value=0, label="one threshold for all labels (0: the tuned ones)")],
        outputs=gradio.Label(num_top_classes=12),
        title=f"{len(predictor.classes)} labels",
    )


if __name__ == "__main__":
    page(sys.argv[1]).launch()
