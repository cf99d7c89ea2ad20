"""Reads TensorBoard's event files: records of a length (8 bytes), its checksum, data, checksum."""

import struct


def events_in(folder):
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def curves(folder):
    """Values by step and tag."""
    return {
        (event.step, value.tag): value.simple_value
        for event in events_in(folder)
        for value in event.summary.value
    }
