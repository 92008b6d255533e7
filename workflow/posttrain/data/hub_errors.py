"""Messages for errors of the hub, the network and the disk, with what to do."""

import errno
from contextlib import contextmanager

from posttrain.ground.errors import UserError

FULL = "Free some space, or set HF_HOME to a larger disk (for every stage), and run again: it continues."


@contextmanager
def explained(kind: str, id: str, revision: str | None):
    """Turn an exception of huggingface_hub into a UserError that says what to do and shows no token."""
    from huggingface_hub import get_token

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        words = in_words(error, kind, id, revision)
        if words is None:
            raise
        token = get_token()
        raise UserError(words.replace(token, "***") if token else words) from None


def in_words(error: BaseException, kind: str, id: str, revision: str | None) -> str | None:
    """The message for an exception of huggingface_hub; None for any other exception."""
    from huggingface_hub import errors as hub

    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{id}"
    login = "set HF_TOKEN (or run `hf auth login`) on this machine and run again."
    if isinstance(error, (hub.LocalEntryNotFoundError, ValueError)) and error.__cause__:
        error = error.__cause__  # its cause says why the file could not be fetched
    words: str | None
    match error:
        case hub.GatedRepoError():
            words = f"is gated. Ask for access on {page}, {login}"
        case hub.RepositoryNotFoundError():
            words = f"no such {kind} for this account. Check the id; if it is private, {login}"
        case hub.RevisionNotFoundError():
            words = f"no such revision. The commits are listed on {page}/commits/main."
        case hub.HFValidationError():
            words = str(error).splitlines()[0]
        case hub.HfHubHTTPError():
            words = words_for_status(error.response.status_code, login)
        case OSError() if error.errno:
            words = words_for_errno(error)
        case _:
            words = words_for_transport(error)
    return words and f"{kind} {id} at {revision or 'main'}: {words}"


def words_for_status(status: int, login: str) -> str:
    if status in (401, 403):
        return f"the hub refuses access (HTTP {status}). Check the token: {login}"
    return f"the hub answers HTTP {status}. Run again later: it continues."


def words_for_errno(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error.strerror}). {FULL}"
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"cannot write {error.filename}. Set HF_HOME to a folder of yours, for every stage."
    return f"{error.strerror} ({error.filename}). Run again: it continues."


def words_for_transport(error: BaseException) -> str | None:
    """The message for a failed connection; None for any other exception."""
    from httpx2 import TransportError
    from huggingface_hub import errors as hub

    if isinstance(error, hub.OfflineModeIsEnabled):
        return "not whole in the cache, and HF_HUB_OFFLINE is set. Unset it for fetch."
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return "a file arrives truncated. Run again; if that does not help, check proxies and HF_ENDPOINT."
    if isinstance(error, (TransportError, hub.LocalEntryNotFoundError, hub.XetDownloadError, OSError)):
        kind = type(error).__name__
        return f"no connection to the hub ({kind}). Check the network and HTTPS_PROXY, run again: it continues."
    return None
