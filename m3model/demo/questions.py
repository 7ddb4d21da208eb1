"""What the demo asks its collection, and the documents asked for, which the collection always holds."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["QUESTIONS", "Question"]


class Question(NamedTuple):
    """A question, its language, and the objects whose documentation answers it."""

    language: str
    text: str
    answers: tuple[str, ...]


QUESTIONS = (
    Question(
        "English",
        "how do I compute eigenvalues of a symmetric matrix",
        ("numpy.linalg.eigvalsh", "numpy.linalg.eigh", "torch.linalg.eigh", "torch.linalg.eigvalsh"),
    ),
    Question("English", "keep gradients from exploding", ("torch.nn.utils.clip_grad_norm_",)),
    Question(
        "Chinese",
        "如何计算对称矩阵的特征值",
        ("numpy.linalg.eigvalsh", "numpy.linalg.eigh", "torch.linalg.eigh", "torch.linalg.eigvalsh"),
    ),
    Question("Chinese", "怎样把几个数组沿着一个轴连接起来", ("numpy.concatenate", "torch.cat")),
    Question("German", "Wie löse ich ein lineares Gleichungssystem?", ("numpy.linalg.solve", "torch.linalg.solve")),
    Question("German", "ein Feld in einer Datei speichern", ("numpy.save", "numpy.savez", "torch.save")),
    Question(
        "Spanish", "generar números aleatorios de una distribución normal", ("numpy.random.normal", "torch.randn")
    ),
    Question("Russian", "случайно обнулять нейроны во время обучения", ("torch.nn.Dropout",)),
    Question("Russian", "медиана элементов массива", ("numpy.median", "torch.median")),
    Question("Arabic", "كيف أحسب تحويل فورييه", ("numpy.fft.fft", "torch.fft.fft")),
    Question("Hindi", "सरणी के तत्वों को क्रमबद्ध कैसे करें", ("numpy.sort", "torch.sort")),
    Question("Japanese", "行列の逆行列を求める", ("numpy.linalg.inv", "torch.linalg.inv")),
)
