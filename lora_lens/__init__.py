"""Which part of a pretrained model's spectrum should LoRA train, and what does it cost in forgetting?

In five lines::

    import lora_lens as ll

    model, source = ll.tasks.bundled.vision()
    spectra = ll.spectra(model)
    adapted = ll.attach(model, ll.Window(rank=8, position=0.5), spectra=spectra)
    run = ll.finetune(adapted, ll.tasks.bundled.digits(), retain=source)
"""

from lora_lens._base.lazy import attach_stub

__version__ = "0.2.0"
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
