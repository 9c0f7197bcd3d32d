//! Why a VM is where it is, in words: from its place and the last record that changed its owner.

use crate::control::{VmState, VmView};
use crate::engine::{Placement, Standing};
use crate::gateway::Gateway;
use crate::types::{Epoch, MigrationId, Side};

impl Gateway {
    /// Completes what is shown of a VM; what keeps it from running stays in front.
    pub(super) fn explain(&self, view: &mut VmView, place: Option<&Placement>, standing: Option<&Standing>) {
        if let Some(standing) = standing.filter(|standing| standing.open && standing.side == Side::Destination && place.is_none_or(is_away))
            && !self.registry.is_under_way(standing.migration)
        {
            view.state = VmState::InDoubt;
            view.owner_epoch = standing.epoch;
            let peer = self.peer_name(standing);
            view.place = peer.clone();
            view.why = Some(format!(
                "prepared here in migration `{0}`: {1} has not said whether it gives the VM; `sealane resolve {0}`",
                short(standing.migration),
                peer
            ));
            return;
        }
        let because = match (place, standing) {
            (Some(Placement::Here { epoch, .. }), Some(standing)) if standing.cold && standing.epoch == *epoch => {
                if view.state == VmState::Unreachable {
                    // Whatever answers there next is the VM, started from its disks.
                    view.state = VmState::Cold;
                }
                Some(cold(standing, &self.peer_name(standing)))
            }
            (Some(Placement::Here { epoch, .. }), Some(standing)) if !standing.open && standing.epoch == *epoch => {
                Some(format!("here since {} at epoch {epoch}: {}", told(standing, &self.peer_name(standing)), standing.record.meaning))
            }
            (Some(Placement::Here { epoch: Epoch(1), .. }), _) => Some("here by the configuration; no migration has moved it".to_owned()),
            (Some(Placement::Given { migration, peer, .. }), _) => {
                let peer = self.config.peer_of(peer).map_or_else(|| peer.to_string(), |peer| peer.name.to_string());
                let id = short(*migration);
                Some(format!("given to {peer} in migration `{id}`: COMMIT is journaled, no answer yet; `sealane resolve {id}`"))
            }
            (Some(Placement::Cold { .. }), Some(standing)) => Some(cold(standing, &self.peer_name(standing))),
            (Some(Placement::Away { epoch, .. }), Some(standing)) if standing.epoch == *epoch => {
                Some(format!("away since {} at epoch {epoch}", told(standing, &self.peer_name(standing))))
            }
            _ => None,
        };
        view.why = match (view.why.take(), because) {
            (Some(why), Some(because)) => Some(format!("{why}; {because}")),
            (why, because) => why.or(because),
        };
    }

    fn peer_name(&self, standing: &Standing) -> String {
        self.config.peer_of(&standing.peer).map_or_else(|| standing.peer.to_string(), |peer| peer.name.to_string())
    }
}

fn is_away(place: &Placement) -> bool {
    matches!(place, Placement::Away { .. })
}

fn cold(standing: &Standing, peer: &str) -> String {
    format!("cold since {}: its memory is lost or not to be trusted; start it from its disks where `socket` says", told(standing, peer))
}

/// `RUN of migration `5f3a9b0c` from gw-a`.
fn told(standing: &Standing, peer: &str) -> String {
    let way = if standing.side == Side::Source { "to" } else { "from" };
    format!("{} of migration `{}` {way} {peer}", standing.record.name.to_uppercase(), short(standing.migration))
}

/// Enough digits for commands.
fn short(id: MigrationId) -> String {
    id.to_string().chars().take(8).collect()
}
