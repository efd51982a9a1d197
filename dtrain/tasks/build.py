"""Chooses and builds the task. This is the only place that does."""

from __future__ import annotations

from dtrain.config import task
from dtrain.config.schema import Config
from dtrain.distributed.rank_context import RankContext
from dtrain.tasks.info import TaskInfo
from dtrain.tasks.protocol import Task


def build_task(config: Config, context: RankContext) -> Task:
    """Collective. Reads and encodes the data, once per node, and returns the task with its splits."""
    return task_info(config.task).prepare(config, context)


def task_info(options: task.TaskSettings) -> TaskInfo:
    """Returns the information about the task with these settings that the rest of dtrain uses."""
    match options:
        case task.Classification():
            from dtrain.tasks import classification

            return classification.info(options)
        case task.MultiLabel():
            from dtrain.tasks import multi_label

            return multi_label.info(options)
        case task.Regression():
            from dtrain.tasks import regression

            return regression.info(options)
        case task.CausalLm():
            from dtrain.tasks import causal_lm

            return causal_lm.info(options)
        case task.MaskedLm():
            from dtrain.tasks import masked_lm

            return masked_lm.info(options)
        case task.MultipleChoice():
            from dtrain.tasks import multiple_choice

            return multiple_choice.info(options)
        case task.QuestionAnswering():
            from dtrain.tasks import question_answering

            return question_answering.info(options)
        case task.TokenClassification():
            from dtrain.tasks import token_classification

            return token_classification.info(options)
        case task.Seq2Seq():
            from dtrain.tasks import seq2seq

            return seq2seq.info(options)
        case task.Chat():
            from dtrain.tasks import chat

            return chat.info(options)
        case task.ImageClassification():
            from dtrain.tasks import image_classification

            return image_classification.info(options)
        case task.ImageRegression():
            from dtrain.tasks import image_regression

            return image_regression.info(options)
