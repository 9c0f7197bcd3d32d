//! What the server keeps of a guest between connections, and the order that requests have to keep.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::guest::{AttachedGuest, Refusal};
use super::protocol::{ATTACH_VERSION, Answer, Attachment, RefusalCode, Request, Role, printable};
use crate::hypervisor::generation::random;
use crate::hypervisor::{GuestStatus, Machine, RunState};
use crate::limits;
use crate::memory::PageSet;

/// A guest that is served, whoever is connected.
pub(super) struct Session {
    guest: Arc<Mutex<dyn AttachedGuest>>,
    /// Locked after the guest if both are.
    ledger: Mutex<Ledger>,
    instance: String,
}

#[derive(Debug, Default)]
struct Ledger {
    controller: Option<u64>,
    prepared: bool,
    tracking: bool,
    throttle_percent: u8,
    /// The last harvest and the connection it was sent on, until that connection says that it arrived.
    undelivered: Option<(u64, PageSet)>,
}

/// An answer with what goes with it.
pub(super) struct Reply {
    pub(super) answer: Answer,
    pub(super) payload: Vec<u8>,
    pub(super) descriptor: Option<File>,
}

impl From<Answer> for Reply {
    fn from(answer: Answer) -> Self {
        Self { answer, payload: Vec::new(), descriptor: None }
    }
}

/// Why a request is not performed.
#[derive(Debug)]
pub(super) enum Denial {
    Refused { code: RefusalCode, reason: String },
    Incompatible { lacks: Vec<String> },
}

impl Denial {
    pub(super) fn new(code: RefusalCode, reason: &str) -> Self {
        Self::Refused { code, reason: printable(reason, limits::REASON_BYTES_MAX) }
    }
}

impl From<Refusal> for Denial {
    fn from(refusal: Refusal) -> Self {
        Self::new(RefusalCode::Failed, refusal.reason())
    }
}

impl From<Denial> for Answer {
    fn from(denial: Denial) -> Self {
        match denial {
            Denial::Refused { code, reason } => Self::Refused { code, reason },
            Denial::Incompatible { lacks } => Self::Incompatible { lacks },
        }
    }
}

/// A guest that panicked once is still better controlled than not.
pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    pub(super) fn new(guest: Arc<Mutex<dyn AttachedGuest>>) -> io::Result<Self> {
        Ok(Self { guest, ledger: Mutex::default(), instance: instance()? })
    }

    /// Answers `request` of connection `id`, which has `role` since its hello.
    pub(super) fn answer(&self, id: u64, role: Option<Role>, request: &Request, payload: &[u8]) -> Result<Reply, Denial> {
        match (role, request) {
            (None, Request::Hello { version, role }) => self.hello(id, *version, *role),
            (None, _) => Err(order("expected hello first")),
            (Some(Role::Observe), Request::Status) => Ok(Answer::Status(bounded(lock(&self.guest).status())).into()),
            (Some(Role::Observe), Request::Machine) => self.perform(id, request, payload),
            (Some(Role::Observe), _) => Err(Denial::new(RefusalCode::Forbidden, "an observer may only ask for status and machine")),
            (Some(Role::Control), _) => self.perform(id, request, payload),
        }
    }

    /// The connection goes on, so its last harvest arrived.
    pub(super) fn delivered(&self, id: u64) {
        let mut ledger = lock(&self.ledger);
        if ledger.undelivered.as_ref().is_some_and(|(sent_on, _)| *sent_on == id) {
            ledger.undelivered = None;
        }
    }

    /// The connection has ended: somebody else may take control.
    pub(super) fn release(&self, id: u64) {
        let mut ledger = lock(&self.ledger);
        if ledger.controller == Some(id) {
            ledger.controller = None;
        }
    }

    fn hello(&self, id: u64, version: u32, role: Role) -> Result<Reply, Denial> {
        if version != ATTACH_VERSION {
            let reason = format!("version {version}: this VMM speaks version {ATTACH_VERSION}");
            return Err(Denial::new(RefusalCode::Version, &reason));
        }
        if role == Role::Control {
            let mut ledger = lock(&self.ledger);
            if ledger.controller.is_some() {
                return Err(Denial::new(RefusalCode::Busy, "another gateway controls this guest"));
            }
            ledger.controller = Some(id);
        }
        let state = lock(&self.guest).status().state;
        let ledger = lock(&self.ledger);
        let attachment = Attachment {
            version: ATTACH_VERSION,
            instance: self.instance.clone(),
            state,
            prepared: ledger.prepared,
            tracking: ledger.tracking,
            throttle_percent: ledger.throttle_percent,
        };
        Ok(Answer::Hello(attachment).into())
    }

    /// Performs a request of the gateway in control, in an order that makes sense.
    fn perform(&self, id: u64, request: &Request, payload: &[u8]) -> Result<Reply, Denial> {
        let mut guest = lock(&self.guest);
        let state = guest.status().state;
        self.check_order(request, state)?;
        match request {
            Request::Hello { .. } => return Err(order("hello was said already")),
            Request::Status => return Ok(Answer::Status(bounded(guest.status())).into()),
            Request::Machine => return Ok(Answer::Machine(guest.machine()?).into()),
            Request::Memory => return Ok(Reply { descriptor: Some(guest.memory()?), ..Answer::Memory.into() }),
            Request::Harvest => return self.harvest(id, &mut *guest),
            Request::SaveState => return saved(guest.save_state()?),
            Request::Prepare { machine } => return self.prepare(&mut *guest, machine),
            Request::TrackStart if lock(&self.ledger).tracking => {}
            Request::TrackStart => {
                guest.start_tracking()?;
                let mut ledger = lock(&self.ledger);
                (ledger.tracking, ledger.undelivered) = (true, None);
            }
            Request::TrackStop => {
                guest.stop_tracking()?;
                let mut ledger = lock(&self.ledger);
                (ledger.tracking, ledger.undelivered) = (false, None);
            }
            Request::Throttle { percent } => {
                guest.throttle(*percent)?;
                lock(&self.ledger).throttle_percent = *percent;
            }
            Request::Pause => guest.pause()?,
            Request::Resume => guest.resume()?,
            Request::Renew => guest.renew()?,
            Request::RestoreState => guest.restore_state(payload)?,
            Request::Quit => guest.quit(),
        }
        Ok(Answer::Done.into())
    }

    fn check_order(&self, request: &Request, state: RunState) -> Result<(), Denial> {
        let ledger = lock(&self.ledger);
        let incoming = state == RunState::Incoming;
        let wrong = match request {
            Request::Machine | Request::Memory if incoming && !ledger.prepared => "no twin was prepared",
            Request::Prepare { .. } if !incoming => "this VMM has a guest already",
            Request::Prepare { .. } if ledger.prepared => "a twin was prepared already",
            Request::RestoreState if !incoming => "this VMM has a guest already",
            Request::RestoreState if !ledger.prepared => "no twin was prepared",
            Request::TrackStart | Request::TrackStop | Request::Throttle { .. } if incoming => "no guest runs here yet",
            Request::Pause | Request::Resume | Request::Renew if incoming => "no state was restored",
            Request::Harvest if !ledger.tracking => "dirty pages are not tracked",
            Request::Renew if state != RunState::Paused => "the guest is not paused",
            Request::SaveState if !matches!(state, RunState::Paused | RunState::Ended) => "the guest is not paused",
            Request::Throttle { percent } if *percent > 99 => "expected 0 to 99 percent",
            _ => return Ok(()),
        };
        Err(order(wrong))
    }

    fn harvest(&self, id: u64, guest: &mut dyn AttachedGuest) -> Result<Reply, Denial> {
        let mut set = guest.harvest()?;
        let mut ledger = lock(&self.ledger);
        if let Some((_, earlier)) = &ledger.undelivered {
            set.merge(earlier);
        }
        let payload = set.words().iter().flat_map(|word| word.to_le_bytes()).collect();
        let pages = set.pages();
        ledger.undelivered = Some((id, set));
        Ok(Reply { payload, ..Answer::Harvest { pages }.into() })
    }

    fn prepare(&self, guest: &mut dyn AttachedGuest, machine: &Machine) -> Result<Reply, Denial> {
        match guest.prepare(machine) {
            Ok(memory) => {
                lock(&self.ledger).prepared = true;
                Ok(Reply { descriptor: Some(memory), ..Answer::Memory.into() })
            }
            Err(lacks) => {
                let lacks = lacks.iter().take(limits::ATTACH_LACKS_MAX).map(|lack| printable(lack, limits::REASON_BYTES_MAX)).collect();
                Err(Denial::Incompatible { lacks })
            }
        }
    }
}

fn order(reason: &str) -> Denial {
    Denial::new(RefusalCode::Order, reason)
}

fn saved(payload: Vec<u8>) -> Result<Reply, Denial> {
    if payload.len() > limits::STATE_BYTES_MAX {
        let reason = format!("state has {} bytes: expected at most {}", payload.len(), limits::STATE_BYTES_MAX);
        return Err(Denial::new(RefusalCode::Failed, &reason));
    }
    Ok(Reply { payload, ..Answer::State.into() })
}

fn bounded(mut status: GuestStatus) -> GuestStatus {
    status.last_line = status.last_line.map(|line| printable(&line, limits::STATUS_LINE_BYTES_MAX));
    status
}

/// A number that no other VMM process has.
fn instance() -> io::Result<String> {
    Ok(format!("{:032x}", u128::from_le_bytes(random()?)))
}
