"""One full and one sparse message of every kind of protocol v1, with its payload. Never edit an example: add one."""

from __future__ import annotations

from regrow import wire
from regrow.findings import Finding
from regrow.observations import LinkSeen, Mark, Missing, PhaseSeen, PowerSeen, Row, TransferSeen, UplinkSeen, encode_rows

BOOT, INSTALL, DIGEST = bytes(range(16)), bytes(range(16, 32)), bytes(range(32, 48))

_HEAD = wire.UpdateHead(
    assignment=3,
    version=12,
    epoch=2,
    level=1,
    dtype="int8",
    examples=100,
    size=9,
    digest=DIGEST,
    seconds=1.5,
    loss=0.25,
    scores=[wire.Score(1, 0.5, 0.75, 50)],
)

ROWS: list[Row] = [
    TransferSeen(1_790_000_000.5, 2.5, True, "update", 70_000, 70_090, "r1", 3, 2, 0.0625),
    TransferSeen(1_790_000_003.0, 0.5, False, "model", 9, 40),
    UplinkSeen(1_790_000_003.0, 1e6, 9e5, 1.125e6, True),
    LinkSeen(1_790_000_003.0, 10.0, "wlan0", 80_000, 9_000, 0.0625, 2, "cubic", -61.0, 7.2e7, 2.437e9, "wifi"),
    LinkSeen(1_790_000_003.0, 10.0, "eth0"),
    PowerSeen(1_790_000_003.0, 10.0, 4.5, "ina3221 VDD_IN", "measured", 61.5, "throttled"),
    PowerSeen(1_790_000_003.0, 10.0, None, "unmeasured", "unmeasured"),
    PhaseSeen(1_790_000_003.0, 8.0, "train", 36.0, "model pi4", "modelled", "r1", 3, 0.25, 40, 30.0, 42.0, "under-voltage"),
    PhaseSeen(1_790_000_011.0, 8.0, "idle", None, "unmeasured: no sensor", "unmeasured"),
    Missing(1_790_000_020.0, 60.0, 12),
    Mark(1_790_000_080.0, "sync pulse"),
]

EXAMPLES: dict[str, tuple[wire.Message, bytes]] = {
    "hello": (
        wire.Hello(boot=BOOT, install=INSTALL, uplink_bps=1e6, examples=100, validation_examples=20, step_s=0.125, software="regrow 0.1"),
        b"",
    ),
    "hello-storage": (wire.Hello(boot=BOOT, install=INSTALL, memory_bytes=10**8, storage="auto"), b""),
    "hello-sparse": (wire.Hello(boot=BOOT, install=INSTALL), b""),
    "status": (wire.Status(online=True), b""),
    "status-sparse": (wire.Status(), b""),
    "tasks": (wire.Tasks(tasks=[wire.TaskRef(task="toy", run="r1", term=2**31 + 7)], heartbeat_s=3.0), b""),
    "tasks-empty": (wire.Tasks(), b""),
    "claim": (wire.Claim(run="r1", term=2**31 + 7, beat=41), b""),
    "manifest": (
        wire.Manifest(
            term=2**31 + 7,
            version=12,
            epoch=2,
            dtype="float16",
            always_kept=4,
            lengths=[6, 10],
            chunks=[wire.Chunk(0, 4, DIGEST), wire.Chunk(4, 6, BOOT), wire.Chunk(6, 10, INSTALL)],
            levels=[wire.Blob("0", 2, DIGEST, [DIGEST]), wire.Blob("1", 0, BOOT, [BOOT])],
            programs=[wire.Blob("layout", 70_000, DIGEST, [BOOT, INSTALL])],
        ),
        b"",
    ),
    "manifest-storage": (
        wire.Manifest(
            term=9,
            version=1,
            epoch=0,
            dtype="float32",
            always_kept=0,
            lengths=[5],
            chunks=[wire.Chunk(0, 5, DIGEST)],
            levels=[wire.Blob("0", 0, BOOT, [BOOT])],
            programs=[wire.Blob("train~float16", 7, DIGEST, [DIGEST])],
            float32_bytes=[200_000_000],
        ),
        b"",
    ),
    "manifest-local": (
        wire.Manifest(
            term=9,
            version=1,
            epoch=0,
            dtype="float32",
            always_kept=0,
            lengths=[5],
            chunks=[wire.Chunk(0, 5, DIGEST)],
            levels=[wire.Blob("0", 0, BOOT, [BOOT])],
            programs=[],
            local="personal_masks",
        ),
        b"",
    ),
    "assignment": (
        wire.Assignment(
            term=2**31 + 7,
            number=3,
            version=12,
            epoch=2,
            level=1,
            steps=20,
            batch=16,
            learning_rate=0.05,
            seed=1_000_006,
            dtype="int8",
            chunk_bytes=16_384,
            deadline_s=30.0,
            evaluate_level=4,
        ),
        b"",
    ),
    "update": (wire.UpdateChunk(install=INSTALL, count=2, chunk_bytes=16_384, head=_HEAD), b"values..."),
    "update-later-chunk": (wire.UpdateChunk(install=INSTALL, count=2, chunk_bytes=16_384), b"\x00\xff"),
    "receipt-accepted": (wire.Receipt(term=9, install=INSTALL, sequence=5, outcome="accepted"), b""),
    "receipt-rejected": (wire.Receipt(term=9, install=INSTALL, sequence=5, outcome="rejected", reason="too late", blame=True), b""),
    "receipt-missing": (
        wire.Receipt(term=9, install=INSTALL, sequence=5, outcome="missing", missing=[wire.Range(0, 1), wire.Range(3, 8)]),
        b"",
    ),
    "telemetry": (
        wire.Telemetry(
            install=INSTALL,
            phase="sending",
            assignment=3,
            uplink_bps=8e5,
            bytes_up=1000,
            bytes_down=2000,
            disk_bytes=300,
            step_s=0.5,
            failed="no data",
            pending=wire.Pending(5, 2),
        ),
        b"",
    ),
    "assignment-int4": (
        wire.Assignment(
            term=9,
            number=4,
            version=13,
            epoch=2,
            level=0,
            steps=5,
            batch=20,
            learning_rate=0.125,
            seed=7,
            dtype="int4",
            chunk_bytes=16_384,
            deadline_s=30.0,
        ),
        b"",
    ),
    "update-int4": (
        wire.UpdateChunk(
            install=INSTALL,
            count=1,
            chunk_bytes=16_384,
            head=wire.UpdateHead(assignment=4, version=13, epoch=2, level=0, dtype="int4", examples=100, size=8, digest=DIGEST),
        ),
        bytes.fromhex("0000c03f003c7e0f"),
    ),
    "promotion": (
        wire.Promotion(
            number=3,
            run="r1",
            version=12,
            model=wire.Blob("model", 70_000, DIGEST, [BOOT, INSTALL]),
            withdrawn=[INSTALL],
            head=wire.Head([wire.Blob("layout", 90, BOOT, [BOOT])], 200, 20, 0.05),
        ),
        b"",
    ),
    "promotion-step": (wire.Promotion(number=5, run="r1", model=wire.Blob("model", 9, DIGEST, [BOOT]), step='{"loss":"mse"}'), b""),
    "promotion-none": (wire.Promotion(number=4, run="r1"), b""),
    "promotion-report": (
        wire.PromotionReport(
            number=3,
            outcome="kept",
            reason="worse",
            current=DIGEST,
            new=wire.ModelScore(0.5, 0.75, 40),
            old=wire.ModelScore(0.25, 0.875, 40),
            tuned=wire.ModelScore(0.5, 0.8125, 40),
        ),
        b"",
    ),
    "promotion-report-sparse": (wire.PromotionReport(number=4, outcome="removed"), b""),
    "control": (wire.Control(number=7, action="pause", replace=bytes.fromhex("0b5fc6d8")), b""),
    "control-sparse": (wire.Control(number=1, action="work"), b""),
    "control-report": (wire.ControlReport(number=7, doing="paused", serial=bytes.fromhex("0b5fc6d8")), b""),
    "control-report-sparse": (wire.ControlReport(number=0, doing="working"), b""),
    "certificate-request": (wire.CertificateRequest(csr=b"DER of a request", signing_key=2 * DIGEST, proof=4 * BOOT), b""),
    "certificate": (wire.Certificate(certificate=b"PEM of a certificate"), b""),
    "certificate-none": (wire.Certificate(reason="d1 is not in the fleet"), b""),
    "doctor-request": (wire.DoctorRequest(number=1_780_000_000_000, now_s=1_780_000_000.5), b""),
    "doctor-report": (
        wire.DoctorReport(
            number=1_780_000_000_000,
            findings=[Finding("disk.free", "fail", "3 MB are free", "make room"), Finding("temperature", "unknown", "no thermal zone")],
            memory_bytes=400_000_000,
        ),
        b"",
    ),
    "doctor-report-sparse": (wire.DoctorReport(number=1), b""),
    "older": (wire.Older(stamp=7 << 32 | 1500), b""),
    "release": (
        wire.Release(
            number=3, manifest=b"{}", signed=bytes(64), files=[wire.Blob("regrow-1.0-py3-none-any.whl", 70_000, DIGEST, [BOOT, INSTALL])]
        ),
        b"",
    ),
    "release-withdrawn": (wire.Release(number=3), b""),
    "release-report": (
        wire.ReleaseReport(
            number=3, state="rolled back", percent=100, reason="no round", version="1.0", python="3.11", machine="aarch64", board="pi"
        ),
        b"",
    ),
    "release-report-sparse": (wire.ReleaseReport(number=0, state="none"), b""),
    "telemetry-limits": (
        wire.Telemetry(
            install=INSTALL,
            phase="waiting",
            uplink_bps=1e6,
            link=wire.LinkState(9e5, 1.125e6, 0.0625),
            power=wire.PowerState(4.5, "ina3221 VDD_IN", 61.5, throttled=True),
            limit=wire.Limit("battery at 18 %, floor 20 %", 600.0, 0.25),
        ),
        b"",
    ),
    "observations": (wire.Observations(journal=BOOT, number=7, sent_s=1_790_000_000.5), encode_rows(ROWS)),
    "observations-receipt": (wire.ObservationsReceipt(journal=BOOT, number=7), b""),
    "field": (
        wire.Field(
            number=3,
            name="meadow",
            phase="baseline",
            start_s=1_790_000_010.0,
            end_s=1_790_000_070.0,
            sample_hz=5.0,
            pulse_s=1_790_000_012.0,
            sent_s=1_790_000_000.5,
        ),
        b"",
    ),
    "field-none": (wire.Field(number=4), b""),
    "field-report": (
        wire.FieldReport(
            number=3, phase="baseline", heard_s=1_790_000_000.75, said_s=1_790_000_000.875, meter="unmeasured: no sensor", software="0.1.0"
        ),
        b"",
    ),
    "field-report-sparse": (wire.FieldReport(number=4), b""),
    "control-report-keys": (wire.ControlReport(number=7, doing="working", serial=bytes.fromhex("0b5fc6d8"), keys=3), b""),
    "coordinator-keys": (wire.CoordinatorKeys(number=3, keys=[2 * BOOT, 2 * INSTALL]), b""),
    "coordinator-keys-one": (wire.CoordinatorKeys(number=4, keys=[2 * INSTALL]), b""),
}
