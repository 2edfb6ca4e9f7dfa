"""Publish a student with the repository: `python -m tools.publish RUN NAME PICTURE`.

Writes data/students/NAME.safetensors with a model card, the picture and its mask, so that a test
can repeat the mask. The picture must be one that may be published, such as a drawn one.
"""

import sys
from pathlib import Path

import numpy as np

from lesionkd_core import results
from lesionkd_core.data.images import read_image
from lesionkd_core.export.card import facts, model_card
from lesionkd_core.predict import STUDENTS, load_student, save_png, save_student


def publish(run: Path | str, name: str, picture: np.ndarray) -> Path:
    """Write the files of a student, from a finished run and a picture (H, W, 3) uint8."""
    student, file = load_student(run), STUDENTS / f"{name}.safetensors"
    results.make_folder(STUDENTS)
    save_student(student, file)
    student = load_student(file)
    mask = np.rint(255 * student.predict([picture])[0]).astype(np.uint8)
    save_png(STUDENTS / f"{name}-input.png", picture)
    save_png(STUDENTS / f"{name}-mask.png", mask)
    results.write_text(file.with_suffix(".md"), model_card(student, facts(student)))
    return file


if __name__ == "__main__":
    run, name, picture = sys.argv[1:]
    print(publish(run, name, read_image(Path(picture))))
