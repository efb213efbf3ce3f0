"""Every task of fine-tuning by its name."""

from modernbert.training.tasks.base import Task
from modernbert.training.tasks.language_modelling import CausalLanguageModelling, MaskedLanguageModelling
from modernbert.training.tasks.late_interaction import LateInteraction
from modernbert.training.tasks.multiple_choice import MultipleChoice
from modernbert.training.tasks.question_answering import QuestionAnswering
from modernbert.training.tasks.sentence_embedding import SentenceEmbedding
from modernbert.training.tasks.sparse_embedding import SparseEmbedding
from modernbert.training.tasks.text_classification import TextClassification
from modernbert.training.tasks.text_ranking import TextRanking
from modernbert.training.tasks.token_classification import TokenClassification

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
        LateInteraction,
        SparseEmbedding,
    )
}
