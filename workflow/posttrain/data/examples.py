"""Worked examples within a prompt (few-shot text): questions with their answers before the question that is asked."""

import re

QUESTION = re.compile(
    r"^[ \t#*]*(?:q|question|problem|task|instruction|input|human|user|text|passage|sentence|review)"
    r"(?:[ \t]*\d+)?[ \t*]*[:.)]",
    re.IGNORECASE | re.MULTILINE,
)
ANSWER = re.compile(
    r"^[ \t#*]*(?:a|answer|solution|output|response|reply|assistant|label|sentiment)(?:[ \t]*\d+)?[ \t*]*[:.)]",
    re.IGNORECASE | re.MULTILINE,
)


def parted(prompt: str) -> tuple[str, str]:
    """(worked examples of a prompt, its last question); without examples "" and the whole prompt."""
    questions = list(QUESTION.finditer(prompt))
    if len(questions) < 2 or not ANSWER.search(prompt, questions[0].end(), questions[-1].start()):
        return "", prompt
    question = prompt[questions[-1].end() :]
    end = ANSWER.search(question)
    return prompt[: questions[-1].start()], question[: end.start()] if end else question


def question_asked(prompt: str) -> str:
    """The last question of a prompt with worked examples; the prompt itself where it has none."""
    return parted(prompt)[1]


def has_examples(prompt: str) -> bool:
    """Whether a prompt holds worked examples before its question."""
    return bool(parted(prompt)[0])
