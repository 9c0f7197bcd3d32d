//! `resolve`: what operators decide about VMs in doubt.

use super::daemon::{find, with_client};
use super::flags::{IdPrefix, ResolveFlags};
use super::output::Out;
use super::{Ending, render};
use crate::control::{Choice, Client, DoubtView, Exit, ResolutionState, ResolveRequest};
use crate::telemetry::{ErrorClass, Problem};
use crate::types::MigrationId;

pub(super) fn resolve(flags: &ResolveFlags, out: Out) -> Ending {
    with_client(&flags.daemon, async |client| {
        let list = client.doubts().await.map_err(|error| error.problem())?;
        let Some(what) = flags.what.as_ref().map(crate::types::VmName::as_str) else {
            if out.json {
                out.object(&list);
            } else {
                out.data(&render::doubts(out, &list.doubts));
            }
            return Ok(Exit::Done);
        };
        let found = pick(&list.doubts, what)?;
        match request(flags) {
            Some(request) => step(&client, identify(&client, found, what).await?, &request, out).await,
            None => show(found, what, out),
        }
    })
}

fn request(flags: &ResolveFlags) -> Option<ResolveRequest> {
    let choices = [
        (flags.reclaim, Choice::Reclaim),
        (flags.restart, Choice::Restart),
        (flags.release, Choice::Release),
        (flags.refuse, Choice::Refuse),
    ];
    let choice = choices.into_iter().find_map(|(given, choice)| given.then_some(choice));
    match choice {
        Some(choice) => Some(ResolveRequest::Propose { choice, evidence: flags.evidence.clone() }),
        None if flags.approve => Some(ResolveRequest::Approve),
        None => flags.withdraw.then_some(ResolveRequest::Withdraw),
    }
}

/// The VM in doubt of that name, or the one whose migration's id begins like that.
fn pick<'a>(doubts: &'a [DoubtView], what: &str) -> Result<Option<&'a DoubtView>, Problem> {
    let named: Vec<_> = doubts.iter().filter(|doubt| doubt.vm.as_str() == what).collect();
    let prefix = what.parse::<IdPrefix>().ok();
    let begins = |doubt: &&DoubtView| prefix.as_ref().is_some_and(|prefix| doubt.migration.to_string().starts_with(&prefix.0));
    let fitting = if named.is_empty() { doubts.iter().filter(begins).collect() } else { named };
    match fitting.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        several => Err(Problem::new(ErrorClass::Misuse, format!("{} migrations in doubt are meant by `{what}`", several.len()))
            .with_code("ambiguous-migration")
            .with_hint("give the migration's id; `sealane resolve` lists them")),
    }
}

/// A migration that is in doubt no more is for the gateway to say something about.
async fn identify(client: &Client, found: Option<&DoubtView>, what: &str) -> Result<MigrationId, Problem> {
    match (found, what.parse::<IdPrefix>()) {
        (Some(found), _) => Ok(found.migration),
        (None, Ok(prefix)) => find(client, &prefix).await,
        (None, Err(_)) => Err(not_in_doubt(what)),
    }
}

fn not_in_doubt(what: &str) -> Problem {
    Problem::new(ErrorClass::Misuse, format!("`{what}` is not in doubt at this gateway"))
        .with_code("not-in-doubt")
        .with_hint("`sealane resolve` lists VMs in doubt, `sealane vms` says where every VM is and why")
}

fn show(found: Option<&DoubtView>, what: &str, out: Out) -> Ending {
    let found = found.ok_or_else(|| not_in_doubt(what))?;
    if out.json {
        out.object(&serde_json::json!({ "schema": "sealane.doubt/1", "doubt": found }));
    } else {
        out.data(&render::doubt(out, found));
    }
    Ok(Exit::Done)
}

async fn step(client: &Client, id: MigrationId, request: &ResolveRequest, out: Out) -> Ending {
    let answer = client.resolve(id, request).await.map_err(|error| error.problem())?;
    if out.json {
        out.object(&answer);
    } else {
        out.data(&super::output::printable(&answer.message));
    }
    if answer.state == ResolutionState::Proposed {
        out.talk(&format!("for whoever approves: sealane resolve {} --approve", render::short(answer.migration)));
    }
    Ok(Exit::Done)
}
