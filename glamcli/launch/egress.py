"""Where a bucket is, as seen from a zone, and what its traffic costs."""

from glamcli.errors import CloudError
from glamcli.launch.gcloud import BucketPlace, bucket_place
from glamcli.storage import Remote

# Dollars per GB between two regions: the highest of both continents' (cloud.google.com/vpc/pricing
# and cloud.google.com/storage/pricing, "data transfer within Google Cloud", from memory, 2025).
_PRICES = {
    "us": 0.02,
    "northamerica": 0.02,
    "europe": 0.02,
    "asia": 0.08,
    "australia": 0.10,
    "me": 0.11,
    "africa": 0.11,
    "southamerica": 0.14,
}
_BETWEEN_AMERICA_AND_EUROPE = 0.05
_AMERICA = ("us", "northamerica")
# Buckets in more than one region: their continent, and where traffic is free (dual regions).
_MULTI = {
    "us": ("us", ()),
    "eu": ("europe", ()),
    "asia": ("asia", ()),
    "nam4": ("us", ("us-central1", "us-east1")),
    "eur4": ("europe", ("europe-north1", "europe-west4")),
    "asia1": ("asia", ("asia-northeast1", "asia-northeast2")),
}


def egress(location: BucketPlace, zone: str) -> float | None:
    """Dollars per GB between a bucket and a zone; 0 in one region, None where it is not known."""
    region, name = zone.rpartition("-")[0], location.name.lower()
    continent, free = _MULTI.get(name, (name.split("-")[0], (name,)))
    if region in (*free, *(each.lower() for each in location.regions)):
        return 0.0
    prices = [_PRICES.get(each) for each in (continent, region.split("-")[0])]
    if None in prices:
        return None
    is_american = [each in _AMERICA for each in (continent, region.split("-")[0])]
    price = max(each for each in prices if each is not None)
    across = price == _PRICES["us"] and is_american[0] != is_american[1]
    return _BETWEEN_AMERICA_AND_EUROPE if across else price


def egress_warning(url: Remote, zone: str) -> str | None:
    """What to say of a bucket that is not in the zone's region; None of one that is."""
    bucket, region = str(url).split("/")[2], zone.rpartition("-")[0]
    try:
        location = bucket_place(bucket)
    except CloudError as error:
        return f"where the bucket is, Google does not say: {error.what}"
    price = egress(location, zone)
    if price == 0:
        return None
    costs = "costs money" if price is None else f"costs about {price:.2f} dollars per GB"
    return (
        f"gs://{bucket} is in {location.name}, and the slice in {region}: what goes between them "
        f"{costs}, and takes longer; `glam plan` says how large a checkpoint is"
    )
