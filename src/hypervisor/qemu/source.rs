//! A running QEMU whose guest leaves.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::watch;

use super::monitor::{Migration, Monitor};
use super::{ANSWER_WITHIN, disks, facts};
use crate::condense::Grammar;
use crate::hypervisor::{
    Disk, Exports, Guest, GuestStatus, HypervisorError, Machine, MirrorProgress, RunState, StreamGoal, StreamProgress, StreamSource,
    StreamStage, Streams,
};
use crate::types::{Mode, Side};

/// What a stream that a gateway carries has, and what it must not have: each of these either needs a channel of its own, leaves a
/// part of the guest out of the stream, changes what the end of the stream means, or hides pages.
const CAPABILITIES: [(&str, bool); 14] = [
    ("events", true),
    ("pause-before-switchover", true),
    ("late-block-activate", false),
    ("validate-uuid", true),
    // Not over the sockets of a host.
    ("zero-copy-send", false),
    ("switchover-ack", false),
    ("release-ram", false),
    ("x-ignore-shared", false),
    ("x-colo", false),
    ("background-snapshot", false),
    ("mapped-ram", false),
    ("dirty-bitmaps", false),
    // The gateway packs pages, and better.
    ("xbzrle", false),
    ("compress", false),
];
/// The gateway limits the rate; QEMU's own limit of 128 MiB/s would only be in the way.
const BANDWIDTH: u64 = 1 << 40;
/// How long a QEMU is asked to let its guest go on. WHY: one that waits for a disk or for a socket that breaks answers when that is over.
const WAKE_WITHIN: Duration = Duration::from_secs(30);
/// Between two attempts to reach it.
const AGAIN_PAUSE: Duration = Duration::from_millis(100);
/// What `downtime-limit` may be, milliseconds.
const DOWNTIME_MAX: u64 = 2_000_000;

/// A QEMU at the source.
#[derive(Debug)]
pub struct QemuSource {
    monitor: Monitor,
    machine: Machine,
    /// What was set before this driver set it.
    capabilities: Vec<(String, bool)>,
    parameters: Vec<(String, u64)>,
    /// What the path takes, bytes a second; 0 as long as nobody knows.
    path_rate: u64,
    begun: bool,
    /// Whether nothing was done here that could stop the guest: whether it runs is somebody else's affair then.
    untouched: bool,
    /// Disks that are mirrored.
    mirrors: usize,
    /// How many channels it has for pages besides its main one.
    channels: Option<u16>,
}

impl QemuSource {
    /// Takes the monitor at `path`; `vm` is for messages. Every answer may take `within`.
    ///
    /// # Errors
    /// Nobody listens, another client has the monitor, or it breaks the protocol.
    pub fn attach(path: &Path, vm: &str, within: Duration) -> Result<Self, HypervisorError> {
        let monitor = Monitor::connect(path, vm, within)?;
        let machine = facts::machine(&monitor.qmp)?;
        Ok(Self {
            monitor,
            machine,
            capabilities: Vec::new(),
            parameters: Vec::new(),
            path_rate: 0,
            begun: false,
            untouched: false,
            mirrors: 0,
            channels: None,
        })
    }

    /// What keeps the guest from leaving now, in QEMU's words; nothing when it can.
    ///
    /// # Errors
    /// QEMU is gone.
    pub fn blocked(&self) -> Result<Option<String>, HypervisorError> {
        if self.monitor.status()?.state != RunState::Running {
            return Ok(Some(format!("its guest is `{}`: expected `running`", facts::run_state(&self.monitor.qmp)?)));
        }
        let Migration { blocked_reasons, .. } = self.monitor.migration()?;
        Ok((!blocked_reasons.is_empty()).then(|| blocked_reasons.join("; ")))
    }

    /// The guest's disks that it can write to, with the file of each as QEMU names it.
    ///
    /// # Errors
    /// QEMU is gone.
    pub fn disks(&self) -> Result<Vec<(Disk, String)>, HypervisorError> {
        disks::writable(&self.monitor.qmp)
    }

    /// Its memory moves like this.
    ///
    /// # Errors
    /// This guest cannot move like that, or QEMU is gone.
    pub fn move_as(&mut self, mode: Mode) -> Result<(), HypervisorError> {
        if mode.may_split()
            && let Some(why) = facts::not_split(&self.monitor.qmp, &self.machine)?
        {
            return Err(self.monitor.qmp.refused("migrate", &why));
        }
        self.machine.mode = mode;
        Ok(())
    }

    /// Its pages come on so many channels of their own, of one that cannot be sent like that in its one stream; for more than one channel it
    /// connects to `at`.
    pub fn use_channels(&mut self, count: u16, at: PathBuf) {
        let able = !self.machine.mode.may_split() && facts::grammar(&self.machine) != Grammar::Opaque;
        if count > 1 && !able {
            tracing::warn!(vm = self.monitor.qmp.vm(), "several channels need blocks of memory that QEMU names, and no post-copy");
        }
        self.channels = (count > 1 && able).then_some(count);
        self.monitor.connects_at(at);
    }

    /// The same guest, whose QEMU connects to `at` where it needs more than one channel for its stream.
    #[must_use]
    pub fn connecting_at(mut self, at: PathBuf) -> Self {
        self.monitor.connects_at(at);
        self
    }

    /// These disks move with it, or alone.
    pub fn move_disks(&mut self, disks: Vec<Disk>, only: bool) {
        (self.machine.disks, self.machine.disks_only) = (disks, only);
    }

    /// What keeps the guest from leaving is looked at before anything is done with it.
    fn ensure_free(&mut self, request: &'static str) -> Result<(), HypervisorError> {
        self.untouched = true;
        self.blocked()?.map_or(Ok(()), |why| Err(self.monitor.qmp.refused(request, &why)))
    }

    /// Begins to send, once all channels are there.
    fn begin_on(&mut self, count: u16) -> Result<Streams, HypervisorError> {
        if let Some(packed) = self.monitor.packs_channels()? {
            let why = format!("several channels: expected `multifd-compression` to be `none`, got `{packed}`");
            return Err(self.monitor.qmp.refused("migrate", &why));
        }
        self.set("multifd-channels", u64::from(count))?;
        let (mut taken, _) = self.monitor.channels(json!({}), usize::from(count) + 1)?;
        Ok(Streams { main: taken.remove(0), others: taken, urgent: None })
    }

    /// Sets one parameter, and keeps what it was before anything was set.
    fn set(&mut self, name: &str, value: u64) -> Result<(), HypervisorError> {
        let before = self.monitor.set_parameters(&[(name, value)])?;
        let first = before.into_iter().filter(|(name, _)| self.parameters.iter().all(|(known, _)| known != name)).collect::<Vec<_>>();
        self.parameters.extend(first);
        Ok(())
    }

    /// The guest goes on, if it is this side's.
    fn wake_now(&mut self) -> Result<(), HypervisorError> {
        if !self.untouched {
            self.monitor.take_back()?;
        } else if self.monitor.status()?.state == RunState::Ended {
            return Err(self.monitor.qmp.refused("cont", "the guest has ended"));
        }
        if self.is_lacked()? {
            // It is the destination's, and lacks pages still.
            return Ok(());
        }
        // What moved of its disks is of no use here; the guest has its own.
        if let Err(error) = disks::abandon(&self.monitor, ANSWER_WITHIN) {
            tracing::warn!(%error, "mirrors or exports of disks are left at QEMU");
        }
        if self.untouched {
            return Ok(());
        }
        self.restore();
        // Behind a move neighbours have to learn where the guest is; elsewhere it does no harm.
        let announce = json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 });
        let _ = self.monitor.qmp.execute("announce-self", announce);
        Ok(())
    }

    /// Sets back what this driver has set. One that was interrupted left its own behind.
    fn restore(&mut self) {
        let mut capabilities: Vec<(&str, bool)> = self.capabilities.iter().map(|(name, state)| (name.as_str(), *state)).collect();
        if capabilities.is_empty() {
            // WHY: with it left on, the next migration of somebody else would wait for ever before its switch.
            capabilities.extend([("pause-before-switchover", false), ("postcopy-ram", false), ("postcopy-preempt", false)]);
            capabilities.extend([("return-path", false), ("multifd", false)]);
        }
        let parameters: Vec<(&str, u64)> = self.parameters.iter().map(|(name, value)| (name.as_str(), *value)).collect();
        let restored = self.monitor.set_capabilities(&capabilities).and_then(|_| self.monitor.set_parameters(&parameters));
        if let Err(error) = restored {
            // The guest runs, which matters more.
            tracing::warn!(%error, "QEMU's migration settings are not set back");
        }
        self.capabilities.clear();
        self.parameters.clear();
    }
}

/// Whether nobody listens at a monitor any more, unlike one that is too busy to answer.
fn is_gone(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::NotFound)
}

fn downtime(goal: StreamGoal) -> u64 {
    u64::try_from(goal.downtime_max.as_millis()).unwrap_or(DOWNTIME_MAX).clamp(1, DOWNTIME_MAX)
}

impl Guest for QemuSource {
    fn wake(&mut self) -> Result<(), HypervisorError> {
        let until = Instant::now() + WAKE_WITHIN;
        loop {
            match self.wake_now() {
                // A connection that was given up for an answer that did not come in time says nothing of the guest: QEMU is asked on another.
                Err(HypervisorError::Unreachable { .. }) if Instant::now() < until => {}
                woken => return woken,
            }
            match self.monitor.again() {
                Ok(monitor) => self.monitor = monitor,
                Err(HypervisorError::Unreachable { source, .. }) if !is_gone(&source) => std::thread::sleep(AGAIN_PAUSE),
                Err(error) => return Err(error),
            }
        }
    }

    fn can_renew(&self) -> bool {
        false
    }

    fn renew(&mut self) -> Result<(), HypervisorError> {
        // A guest's VM generation id is fixed on QEMU's command line.
        Err(self.monitor.qmp.refused("renew", "QEMU cannot give a guest that exists a new generation"))
    }

    fn status(&mut self) -> Result<GuestStatus, HypervisorError> {
        self.monitor.status()
    }

    fn is_lacked(&mut self) -> Result<bool, HypervisorError> {
        Ok(self.monitor.migration()?.status.is_some_and(|status| status.starts_with("postcopy-")))
    }

    fn stream_again(&mut self, side: Side) -> Result<Option<(Streams, Grammar)>, HypervisorError> {
        self.machine.mode = Mode::Postcopy;
        self.monitor.ensure_lost()?;
        let streams = match side {
            Side::Source => self.monitor.resume()?,
            Side::Destination => self.monitor.recover()?.into(),
        };
        Ok(Some((streams, self.grammar())))
    }

    fn destroy(&mut self) -> Result<(), HypervisorError> {
        if self.is_lacked()? {
            return Err(self.monitor.qmp.refused("quit", "the destination lacks pages of its guest"));
        }
        self.monitor.quit()
    }
}

impl Exports for QemuSource {
    fn export(&mut self, at: &Path, disks: &[Disk], writable: bool) -> Result<(), HypervisorError> {
        disks::export(&self.monitor, at, disks, writable)
    }

    fn end_exports(&mut self) -> Result<(), HypervisorError> {
        disks::end_exports(&self.monitor, ANSWER_WITHIN)
    }
}

impl StreamSource for QemuSource {
    fn mirror(&mut self, at: &Path, disks: &[Disk], in_place: bool) -> Result<(), HypervisorError> {
        // Before anything is copied that it could not follow.
        self.ensure_free("blockdev-mirror")?;
        self.mirrors = disks.len();
        disks::mirror(&self.monitor, at, disks, in_place)
    }

    fn mirror_progress(&mut self) -> Result<MirrorProgress, HypervisorError> {
        disks::progress(&self.monitor, self.mirrors)
    }

    fn slow_writes(&mut self, disks: &[Disk], bytes_per_second: u64) -> Result<(), HypervisorError> {
        disks::slow_writes(&self.monitor.qmp, disks, bytes_per_second)
    }

    fn end_mirror(&mut self, within: Duration) -> Result<(), HypervisorError> {
        disks::end_mirror(&self.monitor, within)
    }

    fn machine(&self) -> &Machine {
        &self.machine
    }

    fn grammar(&self) -> Grammar {
        facts::grammar(&self.machine)
    }

    fn begin(&mut self, goal: StreamGoal, beside: bool) -> Result<Streams, HypervisorError> {
        self.ensure_free("migrate")?;
        self.monitor.ensure_let_go()?;
        self.untouched = false;
        let splits = self.machine.mode.may_split();
        let beside = beside && splits && self.monitor.connects();
        let more = [("return-path", splits), ("postcopy-ram", splits), ("postcopy-preempt", beside)];
        let more = more.into_iter().chain([("auto-converge", goal.throttle && !splits), ("multifd", self.channels.is_some())]);
        let wanted: Vec<(&str, bool)> = CAPABILITIES.into_iter().chain(more).collect();
        self.capabilities = self.monitor.set_capabilities(&wanted)?;
        let wanted = [("max-bandwidth", BANDWIDTH), ("downtime-limit", downtime(goal)), ("avail-switchover-bandwidth", self.path_rate)];
        self.parameters = self.monitor.set_parameters(&wanted)?;
        self.begun = true;
        match self.channels {
            Some(count) => self.begin_on(count),
            None if beside => self.monitor.streams(json!({})),
            None => Ok(self.monitor.stream("migrate", splits)?.into()),
        }
    }

    fn stages(&self) -> watch::Receiver<StreamStage> {
        self.monitor.stages()
    }

    fn go_on(&mut self) -> Result<(), HypervisorError> {
        self.monitor.qmp.execute("migrate-continue", json!({ "state": "pre-switchover" })).map(drop)
    }

    fn split(&mut self) -> Result<(), HypervisorError> {
        self.monitor.qmp.execute("migrate-start-postcopy", Value::Null).map(drop)
    }

    fn set_goal(&mut self, goal: StreamGoal) -> Result<(), HypervisorError> {
        self.set("downtime-limit", downtime(goal))
    }

    fn set_path_rate(&mut self, bytes_per_second: u64) -> Result<(), HypervisorError> {
        self.path_rate = bytes_per_second;
        if !self.begun {
            return Ok(());
        }
        self.set("avail-switchover-bandwidth", bytes_per_second)
    }

    fn progress(&mut self) -> Result<StreamProgress, HypervisorError> {
        let Migration { ram, expected_downtime, .. } = self.monitor.migration()?;
        let ram = ram.unwrap_or_default();
        Ok(StreamProgress {
            total_bytes: ram.total,
            remaining_bytes: ram.remaining,
            dirty_bytes_per_second: ram.dirty_pages_rate.saturating_mul(ram.page_size),
            rounds: u32::try_from(ram.dirty_sync_count).unwrap_or(u32::MAX),
            downtime_expected: expected_downtime.map(Duration::from_millis),
        })
    }

    fn ensure_complete(&mut self) -> Result<(), HypervisorError> {
        // Only from here on the guest does not go on by itself when its stream breaks.
        self.monitor.ensure("migrate", &[("completed", "postmigrate")])
    }

    fn failure(&mut self) -> HypervisorError {
        self.monitor.failure("migrate")
    }
}

/// How the guest behind a monitor is, what it is made of, and whether it was split and lacks pages that nobody sends.
///
/// # Errors
/// QEMU is gone, or another client has its monitor.
pub fn inspect(path: &Path, vm: &str, within: Duration) -> Result<(Machine, GuestStatus, bool), HypervisorError> {
    let monitor = Monitor::connect(path, vm, within)?;
    Ok((facts::machine(&monitor.qmp)?, monitor.status()?, facts::lacks_pages(&monitor.qmp)?))
}

/// How the guest behind a monitor is.
///
/// # Errors
/// As [`inspect`].
pub fn observe(path: &Path, vm: &str, within: Duration) -> Result<GuestStatus, HypervisorError> {
    Monitor::connect(path, vm, within)?.status()
}

/// Ends a QEMU in which no guest runs.
///
/// # Errors
/// A guest runs in it, or as [`inspect`].
pub fn discard(path: &Path, vm: &str, within: Duration) -> Result<(), HypervisorError> {
    let monitor = Monitor::connect(path, vm, within)?;
    if monitor.status()?.state == RunState::Running {
        return Err(monitor.qmp.refused("quit", "a guest runs in it"));
    }
    monitor.qmp.execute("quit", Value::Null).map(drop)
}
