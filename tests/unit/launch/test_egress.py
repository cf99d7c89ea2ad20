"""What traffic between a bucket and a zone costs."""

import pytest

from glamcli.launch.egress import egress
from glamcli.launch.gcloud import BucketPlace


@pytest.mark.parametrize(
    ("place", "zone", "price"),
    [
        (BucketPlace("US-CENTRAL2"), "us-central2-b", 0.0),
        (BucketPlace("US-CENTRAL1"), "us-central2-b", 0.02),
        (BucketPlace("US"), "us-central2-b", 0.02),
        (BucketPlace("NORTHAMERICA-NORTHEAST1"), "us-east1-d", 0.02),
        (BucketPlace("EUR4"), "europe-west4-b", 0.0),
        (BucketPlace("EUR4"), "us-east1-d", 0.05),
        (BucketPlace("EU"), "europe-west4-b", 0.02),
        (BucketPlace("US", ("US-EAST1", "US-EAST5")), "us-east5-a", 0.0),
        (BucketPlace("EUROPE-WEST4"), "asia-northeast1-b", 0.08),
        (BucketPlace("ASIA-EAST1"), "us-east1-d", 0.08),
        (BucketPlace("MOON-1"), "us-east1-d", None),
    ],
)
def test_traffic_is_free_in_one_region_only(place, zone, price):
    assert egress(place, zone) == price
