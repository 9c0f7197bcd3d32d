//! What a migration would do: every check that exists, in order, without moving anything.

use std::sync::Arc;
use std::time::Duration;

use crate::control::{Check, CheckVerdict, Estimate, MigrateRequest, PlanView};
use crate::gateway::disks::{DiskWish, ensure_clear};
use crate::gateway::outgoing::bug;
use crate::gateway::{Gateway, outgoing::Departure};
use crate::hypervisor::attach::{AttachedSource, Timeouts};
use crate::hypervisor::qemu::{self, QemuSource};
use crate::hypervisor::{Address, Disk, Guest, PagedSource, RunState, StreamSource};
use crate::telemetry::{Problem, RunningOn, chain};
use crate::wire::ErrorClass;

/// How long the guest is watched to learn how fast it dirties memory.
const WATCH: Duration = Duration::from_millis(500);

/// What the guest told.
struct Seen {
    memory_bytes: u64,
    /// Unknown of a hypervisor whose pages are not seen.
    dirty_bytes_per_second: Option<f64>,
    running: bool,
    /// Disks that could move with it.
    disks: Vec<Disk>,
}

impl Gateway {
    /// Looks at everything that can be looked at from here.
    pub(super) async fn plan(self: &Arc<Self>, operator: u32, request: &MigrateRequest) -> Result<PlanView, Problem> {
        let mut plan = Plan::default();
        let mut departure = self.prepare(operator, request)?;
        plan.pass("configuration", format!("VM `{}` is here, peer `{}` is known", departure.vm.name, departure.peer.name));
        plan.judge("policy (request)", self.ask_request(&mut departure).await.map(|()| "this operator may ask for it".to_owned()));
        let seen = self.look_at_guest(&departure).await;
        let seen = match seen {
            Ok(seen) => {
                let rate = seen.dirty_bytes_per_second.map(|rate| format!(", dirties {:.1} MiB/s", rate / f64::from(1 << 20)));
                let how = if seen.running { "running" } else { "not running" };
                plan.pass("guest", format!("{how}, {} MiB of memory{}", seen.memory_bytes >> 20, rate.unwrap_or_default()));
                departure.has_memory(seen.memory_bytes);
                departure.case.disks = DiskWish::asked(departure.disks, &seen.disks);
                Some(seen)
            }
            Err(problem) => {
                plan.fail("guest", problem);
                None
            }
        };
        match self.dial(&departure.peer).await {
            Ok(link) => {
                let rtt = link.session.stats().rtt;
                plan.pass(
                    "peer",
                    format!("`{}` answers in {:.1} ms and is `{}`", departure.peer.name, rtt.as_secs_f64() * 1e3, link.peer.spiffe),
                );
                let (judge, case, session) = (Arc::clone(&self.judge), departure.case.clone(), Arc::clone(&link.session));
                let released = tokio::task::spawn_blocking(move || judge.release(&case, &session)).await.map_err(bug)?;
                let released = released.map_err(|no| no.problem()).map(|permit| match permit.obligations().to_string() {
                    none if none.is_empty() => "this peer may have the VM".to_owned(),
                    obligations => format!("this peer may have the VM, with {obligations}"),
                });
                plan.judge("policy (release)", released);
                link.session.close(None, "plan");
            }
            Err(problem) => {
                plan.fail("peer", problem);
                plan.skip("policy (release)", "the peer was not reached");
            }
        }
        plan.skip("destination", "what the destination itself checks (its policy, memory, CPU) is asked when the VM is offered");
        let estimate = seen.and_then(|seen| estimate(&seen, departure.bandwidth));
        Ok(PlanView {
            schema: Default::default(),
            vm: departure.vm.name.clone(),
            to: departure.peer.name.clone(),
            possible: plan.error.is_none(),
            checks: plan.checks,
            estimate,
            error: plan.error.map(|problem| problem.with_running_on(RunningOn::Source)),
        })
    }

    /// Watches the guest without stopping it.
    async fn look_at_guest(&self, departure: &Departure) -> Result<Seen, Problem> {
        let (address, vm, move_disks) = (departure.address.clone(), departure.vm.name.clone(), departure.disks.is_some());
        tokio::task::spawn_blocking(move || {
            let local =
                |error: crate::hypervisor::HypervisorError| Problem::new(ErrorClass::Local, chain(&error)).with_code("vmm-unreachable");
            let path = match Address::parse(&address) {
                Address::Attach(path) => path,
                Address::Qemu(path) => {
                    let guest = QemuSource::attach(&path, vm.as_str(), qemu::ANSWER_WITHIN).map_err(local)?;
                    if let Some(why) = guest.blocked().map_err(local)? {
                        return Err(Problem::new(ErrorClass::Local, format!("QEMU of VM `{vm}` cannot send its guest: {why}")));
                    }
                    let memory_bytes = guest.machine().regions.iter().map(|region| region.bytes).sum();
                    let disks = guest.disks().map_err(local)?;
                    if move_disks {
                        ensure_clear(vm.as_str(), &disks)?;
                    }
                    let disks = disks.into_iter().map(|(disk, _)| disk).collect();
                    return Ok(Seen { memory_bytes, dirty_bytes_per_second: None, running: true, disks });
                }
            };
            let mut guest = AttachedSource::attach(&path, vm.as_str(), Timeouts::default()).map_err(local)?;
            let running = guest.status().map_err(local)?.state == RunState::Running;
            guest.start_tracking().map_err(local)?;
            std::thread::sleep(WATCH);
            let dirty = guest.harvest().map_err(local);
            guest.stop_tracking().map_err(local)?;
            let dirty_bytes = dirty?.len() * crate::types::PAGE_BYTES as u64;
            Ok(Seen {
                memory_bytes: guest.ram().layout().bytes(),
                dirty_bytes_per_second: Some(dirty_bytes as f64 / WATCH.as_secs_f64()),
                running,
                disks: Vec::new(),
            })
        })
        .await
        .map_err(bug)?
    }
}

/// A bandwidth limit makes time and pause predictable; without one the link is only known once it was used.
fn estimate(seen: &Seen, bandwidth: Option<u64>) -> Option<Estimate> {
    let rate = bandwidth.filter(|rate| *rate > 0)? as f64;
    let dirty = seen.dirty_bytes_per_second?;
    // Pages are assumed to be sent as they are: an upper bound until the encoder has seen them.
    let total = seen.memory_bytes as f64;
    let first = total / rate;
    let left = dirty.min(rate * 0.9) * first;
    let duration = first + left / (rate - dirty.min(rate * 0.9));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a non-negative estimate")]
    let wire_bytes = (rate * duration) as u64;
    Some(Estimate { duration_seconds: duration, downtime_seconds: (dirty * 0.05 / rate).max(0.01), wire_bytes })
}

#[derive(Default)]
struct Plan {
    checks: Vec<Check>,
    error: Option<Problem>,
}

impl Plan {
    fn push(&mut self, name: &str, verdict: CheckVerdict, detail: String, hint: Option<String>) {
        self.checks.push(Check { name: name.to_owned(), verdict, detail, hint });
    }

    fn pass(&mut self, name: &str, detail: String) {
        self.push(name, CheckVerdict::Pass, detail, None);
    }

    fn skip(&mut self, name: &str, why: &str) {
        self.push(name, CheckVerdict::Skipped, why.to_owned(), None);
    }

    fn fail(&mut self, name: &str, problem: Problem) {
        self.push(name, CheckVerdict::Fail, problem.message.clone(), problem.hint.clone());
        self.error.get_or_insert(problem);
    }

    fn judge(&mut self, name: &str, result: Result<String, Problem>) {
        match result {
            Ok(pass) => self.pass(name, pass),
            Err(problem) => self.fail(name, problem),
        }
    }
}
