//! The destination end: memory that is ready before the source comes, and what arrives in it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::side::{Side, cpu_seconds, local, lost, told};
use crate::engine::{DestinationEnd, DestinationOrder, Link, greet, run_destination};
use crate::hypervisor::image::ImageDestination;
use crate::hypervisor::{Machine, PagedDestination};
use crate::telemetry::{ErrorClass, Problem};
use crate::types::PageNumber;
use crate::wire::{Message, Offer};

/// A source that has something for us.
pub(super) struct Arrival {
    pub(super) link: Link,
    pub(super) offer: Offer,
    /// When its session came, and the CPU time of this process at that moment.
    pub(super) began: Instant,
    pub(super) cpu_seconds_before: f64,
}

/// Empty memory for `machine`, all of it there already: a gateway's VMM has its memory before the first page arrives.
pub(super) fn prepare(machine: &Machine) -> Result<ImageDestination, Problem> {
    let what = "the destination's memory";
    let twin = ImageDestination::prepare(super::pair::VM, machine).map_err(|error| local(what, &error))?;
    let pages = twin.ram().pages();
    twin.ram().clear(PageNumber(0), pages).map_err(|error| local(what, &error))?;
    Ok(twin)
}

impl Side {
    /// The next source that offers something. One that only asks whether we are ready, by a session without an offer, learns it
    /// from our HELLO.
    pub(super) async fn next_arrival(&self) -> Result<Arrival, Problem> {
        loop {
            let session = match self.endpoint.accept().await {
                Some(Ok(session)) => session,
                Some(Err(refused)) => return Err(told(&lost(refused.reason))),
                None => return Err(Problem::new(ErrorClass::Bug, "the destination's endpoint ended")),
            };
            let (began, cpu_seconds_before) = (Instant::now(), cpu_seconds());
            // A session that ends early is one that only asked, or a source that says itself what went wrong.
            let Ok(link) = greet(session, &self.hello()).await else { continue };
            match link.session.receive().await {
                Ok(Message::Offer(offer)) => return Ok(Arrival { link, offer, began, cpu_seconds_before }),
                Ok(other) => {
                    let text = format!("a source began with {}: expected OFFER", other.name());
                    return Err(Problem::new(ErrorClass::PeerMisbehaved, text));
                }
                Err(_) => {}
            }
        }
    }

    /// Takes what is offered into `twin`.
    pub(super) async fn take(&self, link: Link, offer: Offer, twin: ImageDestination) -> DestinationEnd {
        let lanes = offer.stream.lanes;
        // Nobody shuts a benchmark down from outside.
        let (_steering, commands) = mpsc::channel(1);
        let (_returns, returns) = mpsc::channel(1);
        let order = DestinationOrder {
            offer,
            lanes,
            evidence: self.evidence.clone(),
            link,
            twin: Box::new(twin) as Box<dyn PagedDestination>,
            ask_commit: Arc::new(|_| Ok(())),
            bandwidth_max: None,
            policy_digest: [0; 32],
            commands,
            returns,
            outage_max: Duration::ZERO,
            progress: None,
            comes_back_in: None,
            disk_socket: std::path::PathBuf::new(),
            held_disks: Vec::new(),
        };
        run_destination(order).await
    }
}
