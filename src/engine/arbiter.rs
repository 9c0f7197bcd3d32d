//! Who is asked before a VM changes its owner, beside the two journals: a seam of the design.
//!
//! Without an arbiter the journals decide, and where one of them is destroyed, operators do. An arbiter keeps one record for
//! each VM, the owner and its epoch, where both gateways reach it, and changes it by compare-and-swap. etcd would come in
//! here: a key for each VM's UUID whose value is side, gateway and epoch, and for each [`Transfer`] one transaction
//! that compares the value with `from` and puts `to`, or reads who stands there. It has to be such a transaction: a lease or a
//! lock of etcd does not exclude anybody (it expires while its holder still believes in it). FENCED, which operators decide,
//! would compare the epoch only: nobody may stand there with a later one. Whoever builds it has one thing more to change:
//! ABORT leaves the epoch as it is, which does not keep a destination from taking over that needs no COMMIT any more.

use crate::engine::handoff::{Binding, JournalRecord};
use crate::migration::{DestinationRecord, SourceRecord};
use crate::types::{Epoch, MigrationId, Side, VmName, VmUuid};

/// An owner of a VM: which end of the migration, and its epoch.
pub type Owner = (Side, Epoch);

/// A change of ownership that a record is about to make durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transfer {
    /// The VM's name.
    pub vm: VmName,
    /// The VM.
    pub uuid: VmUuid,
    /// The attempt.
    pub migration: MigrationId,
    /// Who owns it by this gateway's journal.
    pub from: Owner,
    /// Who owns it afterwards: the end that asks.
    pub to: Owner,
}

/// What the arbiter says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ruling {
    /// It is so from now on.
    Won,
    /// It is not: who owns the VM, in words.
    Lost(String),
}

/// Decides about changes of ownership. Called off the async threads; it may wait for a network, and the guest waits with it.
pub trait Arbiter: std::fmt::Debug + Send + Sync {
    /// May this change be made? The record is written only when the answer is [`Ruling::Won`]; a change that was won and not
    /// written is asked for again, so the same answer has to be given twice.
    fn rule(&self, transfer: &Transfer) -> Ruling;

    /// Whether it may wait. One that does not is asked where it is needed.
    fn waits(&self) -> bool {
        true
    }
}

/// The journals decide alone.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoArbiter;

impl Arbiter for NoArbiter {
    fn rule(&self, _: &Transfer) -> Ruling {
        Ruling::Won
    }

    fn waits(&self) -> bool {
        false
    }
}

/// The change that a record makes, if it makes one that somebody else could have made first. OFFER changes nothing; COMMIT
/// gives the VM up and takes it from nobody; DONE and CLOSED tell of what the other end did.
pub(super) fn transfer(record: &JournalRecord, binding: &Binding) -> Option<Transfer> {
    let given = binding.epoch;
    let before = (Side::Source, Epoch(given.0.saturating_sub(1)));
    let (from, to) = match record {
        JournalRecord::Source(SourceRecord::Abort { .. }) => (before, before),
        JournalRecord::Source(SourceRecord::Reclaim { .. }) => (before, (Side::Source, given.next())),
        JournalRecord::Source(SourceRecord::Fenced { .. }) => ((Side::Destination, given), (Side::Source, given.next())),
        JournalRecord::Destination(DestinationRecord::Run) => (before, (Side::Destination, given)),
        JournalRecord::Destination(DestinationRecord::Fenced) => (before, (Side::Destination, given.next())),
        _ => return None,
    };
    Some(Transfer { vm: binding.vm.clone(), uuid: binding.uuid, migration: binding.migration, from, to })
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::audit::{self, AuditLog};
    use crate::engine::handoff::Failed;
    use crate::engine::{Ahead, Decision, EngineError, Evidence, Host, Resolved, decide, resolve, standing};
    use crate::hypervisor::HypervisorError;
    use crate::identity::{Signer, verify_signature};
    use crate::journal::Journal;
    use crate::migration::{OfferRecord, Outcome};
    use crate::types::Incarnation;
    use crate::wire::{Durability, ErrorClass, FinalDigest, Handoff};

    /// The key of RFC 8410 section 10.3.
    const KEY: &[u8] = b"-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC
-----END PRIVATE KEY-----
";
    const ID: MigrationId = MigrationId([7; 16]);

    struct LogSigner(Signer);

    impl audit::Signer for LogSigner {
        fn sign(&self, bytes: &[u8]) -> Result<[u8; 64], String> {
            Ok(self.0.sign(bytes).unwrap())
        }
        fn public_key(&self) -> [u8; 32] {
            self.0.public_key()
        }
        fn name(&self) -> &str {
            "spiffe://dc1.example.net/gateway/gw-a"
        }
    }

    /// Somebody else was faster, always; it remembers what it was asked.
    #[derive(Debug, Default)]
    struct Lost(Mutex<Vec<Transfer>>);

    impl Arbiter for Lost {
        fn rule(&self, transfer: &Transfer) -> Ruling {
            self.0.lock().unwrap().push(transfer.clone());
            Ruling::Lost("gw-c at epoch 9".into())
        }
    }

    fn evidence(directory: &Path, arbiter: Arc<dyn Arbiter>) -> Evidence {
        let signer = || Signer::from_pkcs8_pem(KEY, Path::new("k")).unwrap();
        Evidence {
            journal: Arc::new(Journal::open(&directory.join("state.redb")).unwrap()),
            audit: AuditLog::open(&directory.join("audit"), "sealane/test", Arc::new(LogSigner(signer()))).unwrap(),
            signer: Arc::new(signer()),
            arbiter,
            images: directory.into(),
            ahead: Ahead::default(),
        }
    }

    fn offer() -> OfferRecord {
        OfferRecord {
            migration: ID,
            vm: "web".parse().unwrap(),
            uuid: VmUuid([1; 16]),
            epoch: Epoch(4),
            peer: "spiffe://dc2.example.net/gateway/gw-b".parse().unwrap(),
            peer_incarnation: Incarnation([2; 16]),
            peer_key: [3; 32],
            policy_digest: [4; 32],
            address: "/nonexistent/web.sock".into(),
            durability: Durability::None,
        }
    }

    const DIGEST: FinalDigest = FinalDigest { state: [0; 32], lanes: [0; 32], memory: 0 };

    fn commit() -> SourceRecord {
        SourceRecord::Commit { digest: DIGEST, position: 1 }
    }

    /// A source in doubt.
    async fn committed(evidence: &Evidence) -> Binding {
        let offer = Box::new(offer());
        let binding = Binding::from(offer.as_ref());
        evidence.record(&binding, SourceRecord::Offer(offer)).await.unwrap();
        evidence.record(&binding, commit()).await.unwrap();
        binding
    }

    fn nobody() -> Host {
        fn gone(address: &str) -> HypervisorError {
            let source = std::io::Error::from(std::io::ErrorKind::NotFound);
            HypervisorError::Unreachable { vm: "web".into(), address: address.into(), source }
        }
        Host {
            attach: Arc::new(|address, _| Err(gone(address))),
            look: Arc::new(|address, _| Err(gone(address))),
            rebuild: Arc::new(|address, _| Err(gone(address))),
            rebuilt_at: Arc::new(|migration| format!("{migration}.sock")),
            pace: Arc::new(|_| None),
        }
    }

    #[test]
    fn only_records_that_take_a_vm_are_asked_for_and_say_from_whom() {
        let binding = Binding::from(&offer());
        let of = |record: JournalRecord| transfer(&record, &binding).map(|transfer| (transfer.from, transfer.to));
        let (source, destination) = (|epoch| (Side::Source, Epoch(epoch)), |epoch| (Side::Destination, Epoch(epoch)));
        assert_eq!(of(SourceRecord::Offer(Box::new(offer())).into()), None);
        assert_eq!(of(commit().into()), None);
        assert_eq!(of(SourceRecord::Done.into()), None);
        assert_eq!(of(SourceRecord::Abort { cold: false }.into()), Some((source(4), source(4))));
        assert_eq!(of(SourceRecord::Reclaim { cold: false }.into()), Some((source(4), source(6))));
        assert_eq!(of(SourceRecord::Fenced { cold: true }.into()), Some((destination(5), source(6))));
        assert_eq!(of(DestinationRecord::Run.into()), Some((source(4), destination(5))));
        assert_eq!(of(DestinationRecord::Fenced.into()), Some((source(4), destination(6))));
        assert_eq!(of(DestinationRecord::Refused.into()), None);
        assert_eq!(of(DestinationRecord::Closed.into()), None);
    }

    #[tokio::test]
    async fn nothing_is_written_when_the_arbiter_says_that_somebody_else_has_the_vm() {
        let directory = tempfile::tempdir().unwrap();
        let arbiter = Arc::new(Lost::default());
        let evidence = evidence(directory.path(), Arc::clone(&arbiter) as Arc<dyn Arbiter>);
        let binding = committed(&evidence).await;
        assert!(arbiter.0.lock().unwrap().is_empty(), "OFFER and COMMIT are nobody else's to make");
        let (head, place) = (evidence.audit.head(), evidence.journal.vm(&binding.vm).unwrap());
        let takes: [JournalRecord; 3] =
            [SourceRecord::Reclaim { cold: false }.into(), SourceRecord::Abort { cold: false }.into(), DestinationRecord::Run.into()];
        for record in takes {
            let error = evidence.record(&binding, record.clone()).await.unwrap_err();
            assert!(matches!(&error, EngineError::Lost { owner, .. } if owner == "gw-c at epoch 9"), "{record:?}: {error:?}");
            assert_eq!(error.class(), ErrorClass::InDoubt);
        }
        let error = decide(&evidence, &nobody(), ID, Decision::Restart).await.unwrap_err();
        assert!(matches!(error, EngineError::Lost { .. }), "{error:?}");
        assert_eq!(arbiter.0.lock().unwrap().len(), 4);
        assert_eq!(evidence.journal.records(ID).unwrap().len(), 2, "OFFER and COMMIT");
        assert_eq!((evidence.audit.head(), evidence.journal.vm(&binding.vm).unwrap()), (head, place));
        assert!(standing(&evidence, ID).unwrap().unwrap().open, "it is in doubt as before");
    }

    #[test]
    fn what_somebody_else_owns_is_left_alone_and_what_failed_to_be_durable_is_told_to_the_machine() {
        let lost = EngineError::Lost { vm: "web".parse().unwrap(), migration: ID, owner: "gw-c at epoch 9".into() };
        let other = EngineError::Bug("a disk".into());
        let of =
            |error| [(false, false), (true, false), (false, true), (true, true)].map(|(durable, owed)| Failed::of(error, durable, owed));
        assert_eq!(of(&lost), [Failed::Owed, Failed::Owed, Failed::Owed, Failed::Owed]);
        assert_eq!(of(&other), [Failed::Attempt, Failed::Durable, Failed::Owed, Failed::Durable]);
    }

    #[tokio::test]
    async fn an_interrupted_offer_stays_as_it_is_when_the_arbiter_says_that_somebody_else_has_the_vm() {
        let directory = tempfile::tempdir().unwrap();
        let evidence = evidence(directory.path(), Arc::new(Lost::default()));
        let offer = Box::new(offer());
        evidence.record(&Binding::from(offer.as_ref()), SourceRecord::Offer(offer)).await.unwrap();
        let error = resolve(&evidence, &nobody(), ID, None).await.unwrap_err();
        assert!(matches!(error, EngineError::Lost { .. }), "{error:?}");
        assert_eq!(evidence.journal.records(ID).unwrap().len(), 1, "no ABORT, and so nothing that lets the guest go on");
    }

    #[tokio::test]
    async fn what_follows_a_record_is_signed_with_it_and_used_only_if_it_is_what_is_said() {
        let directory = tempfile::tempdir().unwrap();
        let evidence = evidence(directory.path(), Arc::new(NoArbiter));
        let said = |position, binding: &Binding| evidence.message(position, binding, Handoff::Commit { digest: DIGEST });
        let binding = committed(&evidence).await;
        let message = said(evidence.journal.position(), &binding);
        let signature = evidence.ahead.take(&message).expect("signed with the record").await.unwrap().unwrap();
        assert!(verify_signature(&evidence.signer.public_key(), &message.signed_bytes(), &signature));
        assert!(evidence.ahead.take(&message).is_none(), "said once, signed once");

        evidence.record(&binding, commit()).await.unwrap();
        assert!(evidence.ahead.take(&said(evidence.journal.position() + 1, &binding)).is_none(), "another position is another message");
        evidence.record(&binding, commit()).await.unwrap();
        evidence.record(&binding, SourceRecord::Done).await.unwrap();
        let other = Binding { epoch: binding.epoch.next(), ..binding };
        assert!(evidence.ahead.take(&said(evidence.journal.position() - 1, &other)).is_none(), "another handoff is another message");
    }

    #[tokio::test]
    async fn the_journals_decide_where_there_is_no_arbiter() {
        let directory = tempfile::tempdir().unwrap();
        let evidence = evidence(directory.path(), Arc::new(NoArbiter));
        committed(&evidence).await;
        let resolved = decide(&evidence, &nobody(), ID, Decision::Restart).await.unwrap();
        assert_eq!(resolved, Resolved::Ended(Outcome::Cold));
        let standing = standing(&evidence, ID).unwrap().unwrap();
        assert_eq!((standing.record.name, standing.open, standing.cold, standing.epoch), ("fenced", false, true, Epoch(6)));
        assert!(standing.record.unix_ms.is_some(), "{standing:?}");
    }
}
