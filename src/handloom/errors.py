"""Every error handloom raises on purpose.

Each message names the thing that is wrong, the limit it broke and the way out. Whoever catches
`HandloomError` catches them all; each class also derives from the built-in a caller would expect
(`ValueError`, `FileNotFoundError`, …).

This module does not know who raises what, or how an error is shown.
"""

from __future__ import annotations


class HandloomError(Exception):
    """Base of every deliberate error."""


# Finding and fetching a model ------------------------------------------------------------------


class ModelNotFound(HandloomError, FileNotFoundError):
    """No model under that name: not a folder, not a file, not on the Hub, not shipped."""


class HubError(HandloomError, OSError):
    """The Hub answered with something we cannot use."""


class HubUnreachable(HubError):
    """No connection to the Hub, or offline mode with nothing in the cache."""


class AuthenticationRequired(HubError):
    """The Hub answered 401: a token is missing or not valid."""


class GatedModel(HubError):
    """The Hub answered 403: the licence of the model has to be accepted first."""


class DownloadCorrupted(HubError):
    """What arrived is not what the Hub said it would send (size or hash)."""


# Reading a checkpoint --------------------------------------------------------------------------


class CheckpointError(HandloomError, ValueError):
    """A weight file, its index, a tensor in it or a saved sequence is damaged, hostile or not what the config says."""


class UnsafeCheckpoint(CheckpointError):
    """Loading would mean running code from the repository: pickle weights, remote code, a kernel repository."""


class ConfigError(HandloomError, ValueError):
    """A field of config.json (or of GGUF metadata) is missing, out of bounds or not understood."""


class UnsupportedModel(ConfigError):
    """The model type, or a variant that its config asks for, is not one we have."""


class TokenizerError(HandloomError, ValueError):
    """The tokenizer files are damaged, missing, or of a kind we do not know."""


class ChatTemplateError(HandloomError, ValueError):
    """No chat template, or one that fails, escapes its sandbox or exceeds its limits."""


# Asking for text -------------------------------------------------------------------------------


class InvalidParam(HandloomError, ValueError):
    """A generation parameter outside its range; the message gives the range."""


class UnsupportedOption(HandloomError, ValueError):
    """An option that transformers knows and handloom does not (yet). Never silently ignored."""


class InvalidPrompt(HandloomError, ValueError):
    """An empty or malformed prompt: token ids out of range, text that is no text, bad embeddings."""


class ContextOverflow(InvalidPrompt):
    """Prompt plus requested tokens do not fit the model's context; the message gives the numbers."""


class OutOfMemory(HandloomError, MemoryError):
    """A request, or a model, does not fit the memory we may use; the message gives bytes needed and had."""


class OutOfPages(OutOfMemory):
    """The KV cache has no free page for this sequence."""


class NonFiniteLogits(HandloomError, ArithmeticError):
    """The model produced NaN, or scores with nothing left to choose from, for one sequence."""


class GrammarError(HandloomError, RuntimeError):
    """In the middle of an output its grammar, alone or with other rules, leaves no token, or exceeds a limit."""


class RequestFailed(HandloomError, RuntimeError):
    """A request ended because code of the caller's (a processor, a criterion, a patch, a decoder) raised; the cause is
    attached."""


class EngineError(HandloomError, RuntimeError):
    """An engine cannot do this: it is in a step already, is closed, or failed in the step a request was in."""


class EngineFull(EngineError):
    """As many requests wait as may, and this one was not to wait for them."""


# The installation ------------------------------------------------------------------------------


class MissingDependency(HandloomError, ImportError):
    """A package that only this use needs is not installed; the message names it."""
