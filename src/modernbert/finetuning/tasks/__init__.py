"""The tasks of fine-tuning."""

from modernbert.finetuning.tasks.base import Task
from modernbert.finetuning.tasks.language_modelling import CausalLanguageModelling, MaskedLanguageModelling
from modernbert.finetuning.tasks.multiple_choice import MultipleChoice
from modernbert.finetuning.tasks.question_answering import QuestionAnswering
from modernbert.finetuning.tasks.sentence_embedding import SentenceEmbedding
from modernbert.finetuning.tasks.text_classification import TextClassification
from modernbert.finetuning.tasks.text_ranking import TextRanking
from modernbert.finetuning.tasks.token_classification import TokenClassification

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        TextClassification,
        TokenClassification,
        QuestionAnswering,
        MultipleChoice,
        MaskedLanguageModelling,
        CausalLanguageModelling,
        SentenceEmbedding,
        TextRanking,
    )
}
__all__ = ["TASKS", "Task"]
