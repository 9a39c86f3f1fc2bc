"""The questions, one file each, in the order of the report."""

from benchmarks.questions import memory, module, network, paper, plan, product, scaling
from benchmarks.questions.question import Question

QUESTIONS: dict[str, Question] = {
    part.QUESTION.name: part.QUESTION
    for part in (module, network, scaling, memory, plan, product, paper)
}
