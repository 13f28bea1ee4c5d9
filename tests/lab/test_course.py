"""Where a course lies: which lessons are used, and where a student's files go."""
import subprocess
import sys
from pathlib import Path

from nanoinfra.lab import find_course_folder as places

ROOT = Path(__file__).parents[2]


def test_a_course_without_lessons_uses_those_of_the_clone(course):
    assert places.course_folder() == course and places.work_folder() == course / "work"
    assert places.lessons_folder() == ROOT / "lessons"
    assert list(places.lesson_folders(with_file="lab.py")) == ["06", "07", "08", "10", "16"]


def test_a_course_with_a_lesson_uses_its_own(bring, course, monkeypatch):
    folder = bring("l08_zero")
    monkeypatch.chdir(folder)
    assert places.course_folder() == course
    assert places.lesson_folders() == {"08": folder}
    assert places.display_path(folder / "lab.py") == "lessons/l08_zero/lab.py"


def test_the_student_edition_inside_a_course_shares_its_work(course, monkeypatch):
    inner = course / "lessons" / "build" / "student" / "lessons" / "l08_zero"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert places.work_folder() == course / "work"


def test_a_lesson_s_modules_come_from_the_course(bring, course):
    (bring("l02_ring_all_reduce") / "cases.py").write_text("WHERE = 'here'\n")
    code = ("from nanoinfra.lab.find_course_folder import make_lessons_importable; "
            "make_lessons_importable(); "
            "from lessons.l02_ring_all_reduce import cases; print(cases.WHERE)")
    done = subprocess.run([sys.executable, "-c", code], cwd=course / "lessons", capture_output=True,
                          text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.stdout == "here\n", done.stderr
