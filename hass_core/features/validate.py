"""Check a whole features stage: every row read, every finding named."""

from dataclasses import dataclass, field

from hass_core.config import TargetConfig
from hass_core.errors import CorruptFile
from hass_core.features.audit import AUDIT, Audit, audit_masks
from hass_core.features.reader import FeatureDataset, shard_names
from hass_core.store import Artifact, Store
from hass_core.target_model.loader import load_target

LEAST_SUPERVISED, MOST_SUPERVISED = 0.01, 0.99  # shares outside of which a mask is likely wrong for all conversations


@dataclass
class FeaturesReport:
    """What a features stage holds, and what is wrong with it."""

    conversations: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def supervised_fraction(self) -> float:
        return self.supervised_tokens / max(1, self.tokens)


def validate_features(store: Store, artifact: Artifact, target_fingerprint: str | None = None) -> FeaturesReport:
    """Read and check all rows. Raises DraftMismatch or CorruptFile when the stage as a whole cannot be read."""
    dataset = FeatureDataset(store, artifact, target_fingerprint=target_fingerprint)
    report = FeaturesReport(conversations=len(dataset))
    names: set[str] = set()
    for index in range(len(dataset)):
        try:
            row = dataset[index]
        except CorruptFile as error:
            report.problems.append(str(error))
            continue
        report.tokens += len(row.token_ids)
        report.supervised_tokens += int(row.loss_mask.sum())
        if row.id in names:
            report.problems.append(f"{artifact.url}: the id {row.id} stands there twice")
        names.add(row.id)
    if report.tokens and not LEAST_SUPERVISED < report.supervised_fraction < MOST_SUPERVISED:
        report.problems.append(f"{artifact.url}: {report.supervised_fraction:.1%} of the tokens are supervised")
    return report


def find_audit(store: Store, artifact: Artifact, target_source: str) -> Audit:
    """The audit stored with the features; made now, with the target's tokenizer, for features from before it was."""
    folder = store.open(artifact)
    manifest = folder.manifest()
    if manifest and AUDIT in manifest.files:
        return Audit.model_validate_json(folder.read_text(AUDIT))
    target = load_target(TargetConfig(source=target_source, device="cpu"))
    return audit_masks(folder, shard_names(folder), target.tokenizer)
