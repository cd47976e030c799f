"""What lmms-eval asks of a task, for the embedded benchmark."""

from PIL import Image

from dmlr.judge import judge


def doc_to_text(doc, *_):
    return doc["prompt"]


def doc_to_visual(doc):
    return [Image.open(f"data/shapes/{doc['image_path']}").convert("RGB")]


def doc_to_messages(doc, *_):
    content = [{"type": "image", "url": doc_to_visual(doc)[0]}, {"type": "text", "text": doc_to_text(doc)}]
    return [{"role": "user", "content": content}]


def process_results(doc, results):
    """accuracy: as this project judges; bare_number: as a scorer does that takes nothing but the answer."""
    wanted = doc["solution"].removeprefix("\\boxed{").removesuffix("}")
    return {
        "accuracy": float(judge(results[0], doc["solution"]).status == "correct"),
        "bare_number": float(results[0] == wanted),
    }
