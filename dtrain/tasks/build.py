"""Which task runs: the one visible choice."""

from __future__ import annotations

from dtrain.config import task
from dtrain.config.schema import Config
from dtrain.distributed.rank_context import RankContext
from dtrain.tasks.protocol import Task


def build_task(config: Config, context: RankContext) -> Task:
    """Collective. Reads and tokenises the data, once per node, and gives the task that explains it."""
    match config.task:
        case task.Classification():
            from dtrain.tasks.classification import prepare_classification

            return prepare_classification(config, config.task, context)
        case task.Regression():
            from dtrain.tasks.regression import prepare_regression

            return prepare_regression(config, context)
        case task.CausalLm():
            from dtrain.tasks.causal_lm import prepare_causal_lm

            return prepare_causal_lm(config, config.task, context)
        case task.MultipleChoice():
            from dtrain.tasks.multiple_choice import prepare_multiple_choice

            return prepare_multiple_choice(config, config.task, context)
        case task.QuestionAnswering():
            from dtrain.tasks.question_answering import prepare_question_answering

            return prepare_question_answering(config, config.task, context)
        case task.TokenClassification():
            from dtrain.tasks.token_classification import prepare_token_classification

            return prepare_token_classification(config, config.task, context)
        case task.Seq2Seq():
            from dtrain.tasks.seq2seq import prepare_seq2seq

            return prepare_seq2seq(config, config.task, context)
        case task.Chat():
            from dtrain.tasks.chat import prepare_chat

            return prepare_chat(config, config.task, context)
        case task.MaskedLm():
            from dtrain.tasks.masked_lm import prepare_masked_lm

            return prepare_masked_lm(config, config.task, context)
        case task.ImageClassification():
            from dtrain.tasks.image_classification import prepare_image_classification

            return prepare_image_classification(config, config.task, context)
        case task.ImageRegression():
            from dtrain.tasks.image_regression import prepare_image_regression

            return prepare_image_regression(config, config.task, context)
