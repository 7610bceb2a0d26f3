from . import bundled as bundled, bundled_texts as bundled_texts, sequences as sequences
from .corpus import Corpus as Corpus, Texts as Texts
from .evaluation import Answers as Answers, evaluate as evaluate
from .hub import dataset_corpus as dataset_corpus, hub_corpus as hub_corpus
from .image_folder import folder_task as folder_task, timm_transform as timm_transform
from .linear_probe import probed as probed
from .own_answers import agreement as agreement
from .readers import text_corpus as text_corpus
from .task import Examples as Examples, Task as Task
from .text import label_word_task as label_word_task, language_task as language_task, text_task as text_task
from .transforms import (
    corrupted as corrupted,
    few_shot as few_shot,
    only_classes as only_classes,
    permuted as permuted,
    rotated as rotated,
)
