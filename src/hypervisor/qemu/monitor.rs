//! A monitor with what both ends of a migration do on it.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::channels::Channels;
use super::facts::{run_state, status};
use super::qmp::{Notice, Qmp, by};
use super::{ANSWER_WITHIN, revive};
use crate::hypervisor::{GuestStatus, HypervisorError, RunState, StreamStage, Streams};

/// What the monitor keeps the descriptor of a stream under, until a migration takes it.
const STREAM_NAME: &str = "sealane";
/// WHY: each time it is full or empty a thread of QEMU's or ours is woken, and what waits in it is written before the guest stops: 1
/// ms on the fastest link.
const STREAM_BUFFER_BYTES: usize = 1 << 20;
/// WHY: what waits in it goes ahead of a page that a guest stands still for.
const SPLIT_BUFFER_BYTES: usize = 32 << 10;
/// WHY: devices of a guest that was split may wait for pages before they go on, and those wait for as long as an outage lasts.
const PAGES_WITHIN: Duration = Duration::from_secs(24 * 3600);
/// Between two looks whether a channel has come.
const CHANNEL_PAUSE: Duration = Duration::from_millis(1);
/// How often it is asked meanwhile whether they come at all.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long a QEMU that listens at its own monitor may take to connect.
const LISTENS_ITSELF: Duration = Duration::from_secs(1);
/// Between two looks at something that QEMU has no event for.
const LOOK_PAUSE: Duration = Duration::from_millis(10);

/// `query-migrate`, as far as it is of use. Everything is missing before the first migration.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub(super) struct Migration {
    pub(super) status: Option<String>,
    pub(super) error_desc: Option<String>,
    pub(super) expected_downtime: Option<u64>,
    pub(super) blocked_reasons: Vec<String>,
    pub(super) ram: Option<Ram>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub(super) struct Ram {
    pub(super) total: u64,
    pub(super) remaining: u64,
    pub(super) dirty_pages_rate: u64,
    pub(super) page_size: u64,
    pub(super) dirty_sync_count: u64,
}

#[derive(Deserialize)]
struct Capability {
    capability: String,
    state: bool,
}

#[derive(Debug)]
pub(super) struct Monitor {
    pub(super) qmp: Qmp,
    stage: watch::Receiver<StreamStage>,
    within: Duration,
    channels_at: Option<PathBuf>,
}

impl Monitor {
    pub(super) fn connect(path: &Path, vm: &str, within: Duration) -> Result<Self, HypervisorError> {
        let (stages, stage) = watch::channel(StreamStage::Idle);
        let listener = move |notice: Notice<'_>| {
            let next = match notice {
                Notice::Event { name: "MIGRATION", data } => data.get("status").and_then(Value::as_str).and_then(stage_of),
                Notice::Event { .. } => None,
                Notice::Ended(why) => {
                    tracing::debug!(why, "monitor ended");
                    (*stages.borrow() != StreamStage::Complete).then_some(StreamStage::Failed)
                }
            };
            if let Some(next) = next {
                stages.send_replace(next);
            }
        };
        let qmp = Qmp::connect(path, vm, within, Box::new(listener))?;
        Ok(Self { qmp, stage, within, channels_at: None })
    }

    /// The same monitor on another connection, whose stages nobody follows.
    pub(super) fn again(&self) -> Result<Self, HypervisorError> {
        Self::connect(self.qmp.path(), self.qmp.vm(), self.within)
    }

    pub(super) fn stages(&self) -> watch::Receiver<StreamStage> {
        self.stage.clone()
    }

    pub(super) fn migration(&self) -> Result<Migration, HypervisorError> {
        self.qmp.ask("query-migrate", Value::Null)
    }

    fn capabilities(&self) -> Result<Vec<Capability>, HypervisorError> {
        self.qmp.ask("query-migrate-capabilities", Value::Null)
    }

    fn is_capable(&self, name: &str) -> Result<bool, HypervisorError> {
        Ok(self.capabilities()?.iter().any(|known| known.capability == name && known.state))
    }

    /// Switches capabilities that this QEMU has; what they were before.
    pub(super) fn set_capabilities(&self, wanted: &[(&str, bool)]) -> Result<Vec<(String, bool)>, HypervisorError> {
        let known = self.capabilities()?;
        let mut before = Vec::new();
        let mut set = Vec::new();
        for (name, state) in wanted {
            match known.iter().find(|known| known.capability == *name) {
                Some(now) if now.state != *state => {
                    before.push((now.capability.clone(), now.state));
                    set.push(json!({ "capability": name, "state": state }));
                }
                None if *state => return Err(self.qmp.refused("migrate-set-capabilities", &format!("this QEMU has no `{name}`"))),
                _ => {}
            }
        }
        if !set.is_empty() {
            self.qmp.execute("migrate-set-capabilities", json!({ "capabilities": set }))?;
        }
        Ok(before)
    }

    /// Sets parameters that this QEMU has; what they were before.
    pub(super) fn set_parameters(&self, wanted: &[(&str, u64)]) -> Result<Vec<(String, u64)>, HypervisorError> {
        let known: BTreeMap<String, Value> = self.qmp.ask("query-migrate-parameters", Value::Null)?;
        let mut before = Vec::new();
        let mut set = serde_json::Map::new();
        for (name, value) in wanted {
            if let Some(now) = known.get(*name).and_then(Value::as_u64).filter(|now| now != value) {
                before.push(((*name).to_owned(), now));
                set.insert((*name).to_owned(), (*value).into());
            }
        }
        if !set.is_empty() {
            self.qmp.execute("migrate-set-parameters", Value::Object(set))?;
        }
        Ok(before)
    }

    /// How QEMU packs what it sends on several channels, if it does.
    pub(super) fn packs_channels(&self) -> Result<Option<String>, HypervisorError> {
        let parameters: BTreeMap<String, Value> = self.qmp.ask("query-migrate-parameters", Value::Null)?;
        let packed = parameters.get("multifd-compression").and_then(Value::as_str).filter(|how| *how != "none");
        Ok(packed.map(str::to_owned))
    }

    /// Hands QEMU one end of a new stream and tells it to use it; the other end.
    pub(super) fn stream(&self, command: &'static str, splits: bool) -> Result<UnixStream, HypervisorError> {
        self.stream_with(
            command,
            json!({ "uri": format!("fd:{STREAM_NAME}") }),
            if splits { SPLIT_BUFFER_BYTES } else { STREAM_BUFFER_BYTES },
        )
    }

    /// The same, with these arguments, which name it.
    fn stream_with(&self, command: &'static str, arguments: Value, buffer: usize) -> Result<UnixStream, HypervisorError> {
        let local = |source| HypervisorError::Local { vm: self.qmp.vm().to_owned(), what: "cannot make a socket pair", source };
        let (ours, theirs) = UnixStream::pair().map_err(local)?;
        for end in [&ours, &theirs] {
            // The kernel gives what it allows; a smaller one costs time and nothing else.
            let _ = rustix::net::sockopt::set_socket_send_buffer_size(end, buffer);
        }
        self.qmp.execute_with("getfd", json!({ "fdname": STREAM_NAME }), theirs.as_fd())?;
        drop(theirs);
        if let Err(error) = self.qmp.execute(command, arguments) {
            // What was not used stays with the monitor.
            let _ = self.qmp.execute("closefd", json!({ "fdname": STREAM_NAME }));
            return Err(error);
        }
        Ok(ours)
    }

    /// Lets the guest of a source execute, and looks that it does. A migration that is under way is ended first.
    pub(super) fn take_back(&self) -> Result<(), HypervisorError> {
        self.run(true)
    }

    /// Lets the guest of a destination execute, which may be loaded on meanwhile, and looks that it does.
    pub(super) fn go_on(&self) -> Result<(), HypervisorError> {
        // WHY: one that is loaded stands still until this is done, and each question takes a part of a millisecond.
        if run_state(&self.qmp)? == "paused" && self.qmp.execute_within("cont", PAGES_WITHIN).is_ok() && run_state(&self.qmp)? == "running"
        {
            return Ok(());
        }
        self.run(false)
    }

    fn run(&self, ends: bool) -> Result<(), HypervisorError> {
        let (until, patience) = (by(self.within), if ends { self.within } else { PAGES_WITHIN });
        loop {
            let (migration, run) = (self.migration()?.status.unwrap_or_default(), run_state(&self.qmp)?);
            // A source's guest is `finish-migrate` when it was split. One that is the destination's has nothing that could be taken back.
            let ends = ends && !(migration.starts_with("postcopy-") && matches!(run.as_str(), "paused" | "running"));
            // One that ends at this moment is another state in a moment.
            if ends && migration == "postcopy-paused" {
                if let Err(error) = revive::complete(self, self.within) {
                    tracing::warn!(%error, "a migration that was split is not ended yet");
                }
            } else if ends && migration.starts_with("postcopy-") {
                let _ = self.qmp.execute("migrate-pause", Value::Null);
            } else if ends && is_under_way(&migration) {
                let _ = self.qmp.execute("migrate_cancel", Value::Null);
            } else {
                match status(&self.qmp)?.state {
                    RunState::Running => return Ok(()),
                    RunState::Ended => return Err(self.qmp.refused("cont", "the guest has ended")),
                    RunState::Incoming if run != "paused" => return Err(self.qmp.refused("cont", "the guest is not loaded")),
                    // It may not be taken while a migration winds down.
                    RunState::Paused | RunState::Incoming => drop(self.qmp.execute_within("cont", patience)),
                }
                if status(&self.qmp)?.state == RunState::Running {
                    return Ok(());
                }
            }
            if Instant::now() >= until {
                // In QEMU's words, if it has some.
                self.qmp.execute("cont", Value::Null)?;
                return Err(self.qmp.refused("cont", &format!("the guest is `{}`, its migration `{migration}`", run_state(&self.qmp)?)));
            }
            std::thread::sleep(LOOK_PAUSE);
        }
    }

    /// A stream from a source's migration that was split and has lost its own.
    pub(super) fn resume(&self) -> Result<Streams, HypervisorError> {
        let resume = json!({ "resume": true });
        if self.is_capable("postcopy-preempt")? { self.streams(resume) } else { self.stream_again("migrate", resume).map(Into::into) }
    }

    /// The same at a destination.
    pub(super) fn recover(&self) -> Result<UnixStream, HypervisorError> {
        self.stream_again("migrate-recover", json!({}))
    }

    fn stream_again(&self, command: &'static str, mut arguments: Value) -> Result<UnixStream, HypervisorError> {
        if let Some(arguments) = arguments.as_object_mut() {
            arguments.insert("uri".to_owned(), format!("fd:{STREAM_NAME}").into());
        }
        self.stream_with(command, arguments, SPLIT_BUFFER_BYTES)
    }

    /// Where QEMU connects to when it needs more than one channel.
    pub(super) fn connects_at(&mut self, at: PathBuf) {
        self.channels_at = Some(at);
    }

    /// Whether there is such a place.
    pub(super) fn connects(&self) -> bool {
        self.channels_at.is_some()
    }

    /// Its stream, and a channel for pages that are waited for, which comes later.
    pub(super) fn streams(&self, arguments: Value) -> Result<Streams, HypervisorError> {
        let (mut taken, channels) = self.channels(arguments, 1)?;
        Ok(Streams { main: taken.remove(0), others: Vec::new(), urgent: channels.later() })
    }

    /// Has QEMU send its guest, and waits until so many channels have come, the main one in front.
    pub(super) fn channels(&self, mut arguments: Value, wanted: usize) -> Result<(Vec<UnixStream>, Channels), HypervisorError> {
        let vm = self.qmp.vm();
        let local = |source| HypervisorError::Local { vm: vm.to_owned(), what: "cannot take the hypervisor's channels", source };
        let Some(at) = &self.channels_at else { return Err(self.qmp.refused("migrate", "there is no place for its channels")) };
        let mut channels = Channels::listen(at).map_err(local)?;
        if let Some(arguments) = arguments.as_object_mut() {
            arguments.insert("uri".to_owned(), format!("unix:{}", at.display()).into());
        }
        self.qmp.execute("migrate", arguments)?;
        let until = by(ANSWER_WITHIN);
        let (begun, mut looked) = (Instant::now(), Instant::now());
        loop {
            // Who else has a connection may have it before QEMU. It is QEMU that listens at the monitor, unless somebody opened that for it.
            let of = self.qmp.process().filter(|_| begun.elapsed() < LISTENS_ITSELF);
            if let Some(taken) = channels.take(wanted, of).map_err(local)? {
                return Ok((taken, channels));
            }
            if looked.elapsed() > LOOK_EVERY {
                looked = Instant::now();
                if self.migration()?.status.as_deref() == Some("failed") {
                    return Err(self.failure("migrate"));
                }
            }
            if Instant::now() >= until {
                let why = format!("expected {} channels besides the main one, got fewer", wanted.saturating_sub(1));
                return Err(self.qmp.refused("migrate", &why));
            }
            std::thread::sleep(CHANNEL_PAUSE);
        }
    }

    /// Sees that a migration that was split has lost its stream, and has it do so where it has not noticed.
    pub(super) fn ensure_lost(&self) -> Result<(), HypervisorError> {
        let until = by(self.within);
        loop {
            let migration = self.migration()?.status.unwrap_or_default();
            if migration == "postcopy-paused" {
                return Ok(());
            }
            if Instant::now() >= until || !migration.starts_with("postcopy-") {
                return Err(self.qmp.refused("migrate-pause", &format!("expected a migration that was split, got `{migration}`")));
            }
            let _ = self.qmp.execute("migrate-pause", Value::Null);
            std::thread::sleep(LOOK_PAUSE);
        }
    }

    /// Waits until QEMU has let go of what it had for a migration that failed, which it says before it has: it refuses another one until
    /// then, or ends it with the leavings of the last.
    pub(super) fn ensure_let_go(&self) -> Result<(), HypervisorError> {
        #[derive(Deserialize)]
        struct Instance {
            r#type: String,
        }
        let until = by(self.within);
        loop {
            let instances: Vec<Instance> = self.qmp.ask("query-yank", Value::Null)?;
            // One that is under way is refused by `migrate` itself, in QEMU's words.
            if instances.iter().all(|instance| instance.r#type != "migration")
                || self.migration()?.status.is_some_and(|status| is_under_way(&status))
            {
                return Ok(());
            }
            if Instant::now() >= until {
                let why = "it has failed to move this guest before, and waits for ever for a channel that was closed then (a fault of QEMU's); \
                           the guest runs, and moves only behind a restart of its QEMU";
                return Err(self.qmp.refused("migrate", why));
            }
            std::thread::sleep(LOOK_PAUSE);
        }
    }

    /// Sees that a migration and the guest are in one of these states.
    pub(super) fn ensure(&self, request: &'static str, wanted: &[(&str, &str)]) -> Result<(), HypervisorError> {
        let until = by(self.within);
        loop {
            let (migration, run) = (self.migration()?.status.unwrap_or_default(), run_state(&self.qmp)?);
            if wanted.contains(&(migration.as_str(), run.as_str())) {
                return Ok(());
            }
            // The event comes a moment before the state.
            if Instant::now() >= until {
                let wanted = wanted.iter().map(|(migration, run)| format!("`{migration}` and `{run}`")).collect::<Vec<_>>().join(" or ");
                let why = format!("expected its migration and its guest to be {wanted}, got `{migration}` and `{run}`");
                return Err(self.qmp.refused(request, &why));
            }
            std::thread::sleep(LOOK_PAUSE);
        }
    }

    /// Why a migration failed, in QEMU's words if it says so.
    pub(super) fn failure(&self, request: &'static str) -> HypervisorError {
        match self.migration() {
            Ok(Migration { error_desc: Some(why), .. }) => self.qmp.refused(request, &why),
            Ok(Migration { status, .. }) => self.qmp.refused(request, &format!("it ended as `{}`", status.unwrap_or_default())),
            Err(error) => error,
        }
    }

    pub(super) fn status(&self) -> Result<GuestStatus, HypervisorError> {
        status(&self.qmp)
    }

    pub(super) fn quit(&self) -> Result<(), HypervisorError> {
        self.qmp.execute("quit", Value::Null).map(drop)
    }
}

/// What an event says of the stream. A state that is not known changes nothing.
fn stage_of(status: &str) -> Option<StreamStage> {
    match status {
        "setup" | "wait-unplug" | "active" | "device" => Some(StreamStage::Flowing),
        "pre-switchover" => Some(StreamStage::Stopped),
        "postcopy-active" => Some(StreamStage::Split),
        "completed" => Some(StreamStage::Complete),
        "failed" | "cancelled" => Some(StreamStage::Failed),
        _ => None,
    }
}

/// Whether a migration in this state goes on by itself. One that is not known does until it is known to have ended.
fn is_under_way(status: &str) -> bool {
    !matches!(status, "" | "none" | "completed" | "failed" | "cancelled" | "colo")
}
