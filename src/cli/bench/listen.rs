//! `sealane bench listen`: the destination of benchmarks whose source is another process or host.

use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use super::super::Ending;
use super::super::output::Out;
use super::super::render;
use super::super::tools::BenchListenFlags;
use super::arrival::{Arrival, prepare};
use super::side::{DESTINATION, SOURCE, Scratch, Side, cpu_seconds, identity_in, local, make_authority, peer_of, told};
use crate::control::Exit;
use crate::hypervisor::Machine;
use crate::hypervisor::image::ImageDestination;
use crate::migration::Outcome;
use crate::telemetry::{ErrorClass, Problem, schema_tag};
use crate::types::{MigrationId, SpiffeId};

schema_tag!(
    /// Schema of a line of `bench listen --json`.
    ArrivalSchema = "sealane.bench-arrival/1"
);

/// What one arrival cost at this end.
#[derive(Serialize)]
struct Line {
    schema: ArrivalSchema,
    migration_id: MigrationId,
    /// Whether the VM is here now.
    arrived: bool,
    guest_memory_bytes: u64,
    /// From the source's session to the end, as seen here.
    duration_seconds: f64,
    /// CPU time of this process meanwhile, kernel work included.
    cpu_seconds: f64,
    /// Of that, about what lanes spent to make pages of frames.
    decode_seconds: f64,
    error: Option<Problem>,
}

struct Listener {
    side: Side,
    source: SpiffeId,
    memory_bytes_max: u64,
    /// What came last is what comes next: its memory is made before the source's clock starts.
    ready: Option<(Machine, ImageDestination)>,
    out: Out,
}

pub(super) fn listen(flags: &BenchListenFlags, out: Out) -> Ending {
    if !flags.pki.exists() {
        make_authority(&flags.pki)?;
        let directory = flags.pki.display();
        out.talk(&format!("made {directory}: the source needs a copy of it, without ca-key.pem"));
    }
    let credentials = identity_in(&flags.pki, DESTINATION)?;
    let source = peer_of(&credentials, SOURCE)?;
    let scratch = Scratch::new()?;
    let side = Side::new(scratch.path(), DESTINATION, credentials, flags.at)?;
    let address = side.endpoint.local_address();
    let signals = {
        let _inside = side.runtime.enter();
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    };
    let (Ok(mut interrupt), Ok(mut terminate)) = signals else {
        return Err(Problem::new(ErrorClass::Local, "signals cannot be caught"));
    };
    out.talk(&format!("listening at {address}; next: sealane bench --to {address} --pki {} --content realistic", flags.pki.display()));
    let handle = side.runtime.handle().clone();
    let mut listener = Listener { side, source, memory_bytes_max: flags.max_memory.bytes, ready: None, out };
    handle.block_on(async {
        tokio::select! {
            problem = listener.serve() => Err(problem),
            _ = interrupt.recv() => Ok(Exit::Done),
            _ = terminate.recv() => Ok(Exit::Done),
        }
    })
}

impl Listener {
    /// Takes one arrival after the other; returns why that ended.
    async fn serve(&mut self) -> Problem {
        loop {
            let arrival = match self.side.next_arrival().await {
                Ok(arrival) => arrival,
                Err(problem) if problem.class == ErrorClass::Bug => return problem,
                Err(problem) => {
                    self.out.say_problem(&problem);
                    continue;
                }
            };
            let (machine, twin) = match self.twin_for(&arrival) {
                Ok(twin) => twin,
                Err(problem) => {
                    arrival.link.session.close(Some(problem.class), &problem.message);
                    self.out.say_problem(&problem);
                    continue;
                }
            };
            self.take(arrival, twin).await;
            match prepare(&machine) {
                Ok(twin) => self.ready = Some((machine, twin)),
                Err(problem) => return problem,
            }
        }
    }

    fn twin_for(&mut self, arrival: &Arrival) -> Result<(Machine, ImageDestination), Problem> {
        let peer = &arrival.link.peer.spiffe;
        if *peer != self.source {
            let text = format!("`{peer}` may not come here: expected `{}`", self.source);
            return Err(Problem::new(ErrorClass::Denied, text));
        }
        let machine: Machine =
            serde_json::from_slice(&arrival.offer.machine).map_err(|error| local("the machine description of the offer", &error))?;
        let bytes = bytes_of(&machine).filter(|bytes| *bytes <= self.memory_bytes_max);
        if bytes.is_none() {
            let most = render::bytes(self.memory_bytes_max);
            let problem = Problem::new(ErrorClass::Misuse, format!("the source's memory is larger than the {most} of --max-memory"));
            return Err(problem.with_hint("start the listener with a larger --max-memory"));
        }
        match self.ready.take() {
            Some((known, twin)) if (&known.regions, &known.kind) == (&machine.regions, &machine.kind) => Ok((machine, twin)),
            _ => prepare(&machine).map(|twin| (machine, twin)),
        }
    }

    async fn take(&self, arrival: Arrival, twin: ImageDestination) {
        let Arrival { link, offer, began, cpu_seconds_before } = arrival;
        let (migration_id, guest_memory_bytes) = (offer.migration, offer.regions.iter().map(|region| region.bytes).sum());
        let end = self.side.take(link, offer, twin).await;
        let line = Line {
            schema: ArrivalSchema,
            migration_id,
            arrived: matches!(end.outcome, Some(Outcome::Moved)),
            guest_memory_bytes,
            duration_seconds: began.elapsed().as_secs_f64(),
            cpu_seconds: cpu_seconds() - cpu_seconds_before,
            decode_seconds: end.decode.as_secs_f64(),
            error: end.error.as_ref().map(told),
        };
        if self.out.json {
            self.out.object(&line);
        } else {
            let [took, cpu, decode] = [line.duration_seconds, line.cpu_seconds, line.decode_seconds].map(render::seconds);
            let memory = render::bytes(guest_memory_bytes);
            let what = if line.arrived { "arrived" } else { "did not arrive" };
            self.out.data(&format!("migration {migration_id}: {memory} {what} in {took}, cpu {cpu} here, of that decoding {decode}\n"));
        }
        if let Some(error) = &line.error {
            self.out.say_problem(error);
        }
    }
}

fn bytes_of(machine: &Machine) -> Option<u64> {
    machine.regions.iter().try_fold(0_u64, |sum, region| sum.checked_add(region.bytes))
}
