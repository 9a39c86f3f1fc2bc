"""The questions, one file each, in the order of the report."""

from benchmarks.questions.memory import Memory
from benchmarks.questions.module import Module
from benchmarks.questions.network import Networks
from benchmarks.questions.order import Order
from benchmarks.questions.paper import Paper
from benchmarks.questions.plan import Plan
from benchmarks.questions.product import Product
from benchmarks.questions.question import Question
from benchmarks.questions.scaling import Scaling
from benchmarks.questions.settings import Settings

_CLASSES = (Module, Networks, Order, Scaling, Memory, Plan, Product, Paper, Settings)
QUESTIONS: dict[str, Question] = {question.name: question() for question in _CLASSES}
