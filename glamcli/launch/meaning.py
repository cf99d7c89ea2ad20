"""What `gcloud` says when it fails, as errors with advice."""

import re

from glamcli.errors import CloudError


class NotThere(CloudError):
    """No such slice."""


class NoLogin(CloudError):
    """Nobody is logged in, or not any more."""


class NameTaken(CloudError):
    """There is such a slice already."""


class TryAgain(CloudError):
    """What may be different later: no capacity, no quota, no connection."""


class Unclear(TryAgain):
    """Something that gcloud says, and is not known here."""


# The first pattern that is found in what gcloud says; `{}` is the zone.
_MEANINGS: tuple[tuple[str, type[CloudError], str, str | None], ...] = (
    (
        r"active account selected|gcloud auth login|[Rr]eauthenticat|UNAUTHENTICATED|invalid_grant",
        NoLogin,
        "gcloud is not logged in",
        "gcloud auth login",
    ),
    (
        r"(property|attribute) \[(core/)?project\]",
        CloudError,
        "gcloud has no project",
        "name it with `--project`, or `gcloud config set project PROJECT`",
    ),
    (
        r"SERVICE_DISABLED|has not been used in project|it is disabled",
        CloudError,
        "the TPU API is disabled in this project",
        "gcloud services enable tpu.googleapis.com",
    ),
    (
        r"ermission denied on 'locations/|[Ll]ocation .* (is not found|not found|is invalid)"
        r"|Invalid value for field.*zone",
        CloudError,
        "there are no TPUs in the zone {}",
        "gcloud compute tpus locations list",
    ),
    (
        r"ccelerator ?[Tt]ype.*(not (found|available|supported)|invalid|[Uu]nknown|does not exist)"
        r"|(not (found|available|supported)|[Ii]nvalid|[Uu]nknown) accelerator ?[Tt]ype",
        CloudError,
        "the zone {} does not have this kind of slice",
        "gcloud compute tpus accelerator-types list --zone {}",
    ),
    (r"Limit: 0\b|[Ll]imit 0 ", CloudError, "the quota for this kind of TPU is 0 in {}", "QUOTA"),
    (
        r"[Qq]uota.*(exceeded|exhausted)|RESOURCE_EXHAUSTED",
        TryAgain,
        "the quota is used up",
        "QUOTA",
    ),
    (r"no more capacity|[Ii]nsufficient|STOCKOUT", TryAgain, "there is no capacity in {}", None),
    (
        r"ALREADY_EXISTS|already exists",
        NameTaken,
        "the name is taken in {} by what was not launched from here",
        "choose another with `--name`",
    ),
    (
        r"unrecognized arguments|Invalid choice",
        CloudError,
        "this gcloud does not know the command",
        "gcloud components update",
    ),
    (
        r"PERMISSION_DENIED|does not have permission|[Rr]equired '[\w.]+' permission",
        CloudError,
        "this account may not do that",
        "it needs the roles TPU Admin and Service Account User in the project",
    ),
    (
        r"UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|Max retries|onnection|[Tt]imed? ?out|\b50[0234]\b"
        r"|ServerNotFound|unable to find the server|ABORTED",
        TryAgain,
        "Google did not answer",
        None,
    ),
)
_QUOTA = "https://console.cloud.google.com/iam-admin/quotas shows it; ask for more there"


def meaning(said: str, zone: str, doing: str, name: str = "") -> CloudError:
    """The error that gcloud's own words are, which are kept in it; `name` is the slice's."""
    lines = [line for line in said.splitlines() if "ERROR" in line] or said.splitlines()[-1:]
    last = re.sub(r"^ERROR: (\([\w.-]+\) )?", "", lines[0].strip())[:500] if lines else "no reason"
    if name and re.search(rf"NOT_FOUND.*[/'\"]{re.escape(name)}(?![-\w])", said):
        return NotThere(f"{doing}: not there (gcloud: {last})")
    for pattern, kind, what, hint in _MEANINGS:
        if re.search(pattern, said):
            advice = _QUOTA if hint == "QUOTA" else hint and hint.replace("{}", zone)
            return kind(f"{doing}: {what.replace('{}', zone)} (gcloud: {last})", advice)
    return Unclear(f"{doing}: gcloud failed: {last}")
