//! Commands that ask a gateway.

use std::path::{Path, PathBuf};

use super::flags::{
    Change, DaemonFlags, IdFlags, IdPrefix, MigrateFlags, MigrationFlags, ModeFlag, OptionalIdFlags, SetFlags, StorageCommand, StorageFlag,
    StorageMigrateFlags,
};
use super::follow::{self, Interrupts};
use super::output::Out;
use super::{Ending, render};
use crate::config::{DEFAULT_CONTROL_SOCKET, DEFAULT_FILE};
use crate::control::{Client, ClientError, Exit, GatewayView, MigrateRequest, MigrationView, SetRequest, Storage, exit_of, exit_of_report};
use crate::telemetry::{ErrorClass, Mode, Problem, RunningOn};
use crate::types::MigrationId;

pub(super) fn vms(flags: &DaemonFlags, out: Out) -> Ending {
    let list = ask(flags, async |client| client.vms().await)?;
    if out.json {
        out.object(&list);
    } else {
        out.data(&render::vms(out, &list.vms));
    }
    Ok(Exit::Done)
}

pub(super) fn peers(flags: &DaemonFlags, out: Out) -> Ending {
    let list = ask(flags, async |client| client.peers().await)?;
    if out.json {
        out.object(&list);
    } else {
        out.data(&render::peers(out, &list.peers));
    }
    Ok(Exit::Done)
}

pub(super) fn history(flags: &DaemonFlags, out: Out) -> Ending {
    let history = ask(flags, async |client| client.history().await)?;
    if out.json {
        out.object(&history);
    } else {
        out.data(&render::history(out, &history.reports));
    }
    Ok(Exit::Done)
}

pub(super) fn status(flags: &OptionalIdFlags, out: Out) -> Ending {
    if let Some(prefix) = &flags.id {
        let view = with_client(&flags.daemon, async |client| {
            let id = find(&client, prefix).await?;
            client.migration(id).await.map_err(|error| error.problem())
        })?;
        show(&view, out);
        return Ok(Exit::Done);
    }
    let (gateway, list) = ask(&flags.daemon, async |client| Ok((client.gateway().await?, client.migrations().await?)))?;
    if out.json {
        out.object(&serde_json::json!({ "schema": "sealane.status/1", "gateway": gateway, "migrations": list.migrations }));
    } else {
        out.data(&(render::gateway(&gateway) + &render::migrations(out, &list.migrations)));
    }
    Ok(Exit::Done)
}

pub(super) fn reload(flags: &DaemonFlags, out: Out) -> Ending {
    let view = ask(flags, async |client| client.reload().await)?;
    if out.json {
        out.object(&view);
    } else {
        out.data(&render::gateway(&view));
    }
    Ok(Exit::Done)
}

pub(super) fn cancel(flags: &IdFlags, out: Out) -> Ending {
    let view = with_client(&flags.daemon, async |client| {
        let id = find(&client, &flags.id).await?;
        client.cancel(id).await.map_err(|error| error.problem())
    })?;
    show(&view, out);
    if view.report.is_none() {
        out.talk(&format!("asked to stop; `sealane watch {}` follows it to its end", render::short(view.id)));
    }
    Ok(Exit::Done)
}

pub(super) fn set(flags: &SetFlags, out: Out) -> Ending {
    let mut change = SetRequest::default();
    for one in &flags.changes {
        match one {
            Change::Bandwidth(bandwidth) => change.bandwidth_bytes_per_second = Some(bandwidth.bytes_per_second),
            Change::MaxDowntime(span) => change.max_downtime_seconds = Some(span.duration.as_secs_f64()),
        }
    }
    let view = with_client(&flags.daemon, async |client| {
        let id = find(&client, &flags.id).await?;
        client.set(id, &change).await.map_err(|error| error.problem())
    })?;
    show(&view, out);
    Ok(Exit::Done)
}

pub(super) fn watch(flags: &IdFlags, out: Out) -> Ending {
    with_client(&flags.daemon, async |client| {
        let id = find(&client, &flags.id).await?;
        follow::follow(&client, id, out, out.json, Interrupts::end_the_command()).await
    })
}

pub(super) fn plan(flags: &MigrationFlags, out: Out) -> Ending {
    plan_for(request(flags), &flags.daemon, out)
}

fn plan_for(mut request: MigrateRequest, daemon: &DaemonFlags, out: Out) -> Ending {
    request.dry_run = true;
    let plan = untouched(ask(daemon, async |client| client.plan(&request).await))?;
    if out.json {
        out.object(&plan);
    } else {
        out.data(&render::plan(out, &plan));
    }
    match plan.error {
        None if plan.possible => Ok(Exit::Done),
        None => Ok(Exit::Failed),
        Some(problem) => {
            out.say_problem(&problem);
            Ok(exit_of(&problem))
        }
    }
}

pub(super) fn migrate(flags: &MigrateFlags, out: Out) -> Ending {
    let (request, daemon) = (request(&flags.migration), &flags.migration.daemon);
    if flags.dry_run { plan_for(request, daemon, out) } else { start(&request, daemon, flags.detach, out) }
}

pub(super) fn storage(command: &StorageCommand, out: Out) -> Ending {
    let StorageCommand::Migrate(flags) = command;
    let request = storage_request(flags);
    if flags.dry_run { plan_for(request, &flags.daemon, out) } else { start(&request, &flags.daemon, flags.detach, out) }
}

fn start(request: &MigrateRequest, daemon: &DaemonFlags, detach: bool, out: Out) -> Ending {
    with_client(daemon, async |client| {
        // From here on Ctrl-C must not leave a migration behind that nobody knows of.
        let mut interrupts = Interrupts::cancel_then_detach()?;
        let Some(started) = interrupts.through(client.start(request), out).await else {
            return Err(Problem::new(ErrorClass::InDoubt, format!("left before the gateway said whether it migrates `{}`", request.vm))
                .with_code("answer-lost")
                .with_hint("`sealane status` and `sealane vms` tell"));
        };
        let started = untouched(started.map_err(|error| error.problem()))?;
        if detach {
            if out.json {
                out.object(&started);
            } else {
                out.data(&started.id.to_string());
            }
            return Ok(Exit::Done);
        }
        out.talk(&format!("migration {} of {} to {}", started.id, started.vm, started.peer));
        follow::follow(&client, started.id, out, false, interrupts).await
    })
}

fn storage_request(flags: &StorageMigrateFlags) -> MigrateRequest {
    let mut request = MigrateRequest::new(flags.vm.clone(), flags.to.clone());
    request.bandwidth_bytes_per_second = flags.bandwidth.map(|bandwidth| bandwidth.bytes_per_second);
    request.timeout_seconds = flags.timeout.map(|span| span.duration.as_secs_f64());
    request.max_outage_seconds = flags.max_outage.map(|span| span.duration.as_secs_f64());
    request.compress = flags.compress;
    request.storage = Storage::Only;
    request
}

/// A request that never reached the gateway has moved nothing.
fn untouched<T>(result: Result<T, Problem>) -> Result<T, Problem> {
    result.map_err(|problem| match problem.code.as_str() {
        "gateway-not-running" | "socket-not-permitted" => problem.with_running_on(RunningOn::Source),
        _ => problem,
    })
}

fn request(flags: &MigrationFlags) -> MigrateRequest {
    let mut request = MigrateRequest::new(flags.vm.clone(), flags.to.clone());
    request.bandwidth_bytes_per_second = flags.bandwidth.map(|bandwidth| bandwidth.bytes_per_second);
    request.max_downtime_seconds = flags.max_downtime.map(|span| span.duration.as_secs_f64());
    request.timeout_seconds = flags.timeout.map(|span| span.duration.as_secs_f64());
    request.max_outage_seconds = flags.max_outage.map(|span| span.duration.as_secs_f64());
    request.mode = match flags.mode {
        ModeFlag::Precopy => Mode::Precopy,
        ModeFlag::Postcopy => Mode::Postcopy,
        ModeFlag::Hybrid => Mode::Hybrid,
    };
    request.storage = match flags.storage {
        StorageFlag::None => Storage::None,
        StorageFlag::All => Storage::All,
    };
    request.verify_disks = flags.verify_disks;
    request.verify = flags.verify;
    request.throttle = flags.throttle;
    request.compress = flags.compress;
    request.lanes = flags.lanes;
    request.channels = flags.channels;
    request
}

fn show(view: &MigrationView, out: Out) {
    if out.json {
        out.object(view);
    } else {
        out.data(&render::migration(out, view));
    }
    if let Some(error) = view.report.as_ref().filter(|report| exit_of_report(report) != Exit::Done).and_then(|report| report.error.as_ref())
    {
        out.say_problem(error);
    }
}

/// The migration whose id begins like that.
pub(super) async fn find(client: &Client, prefix: &IdPrefix) -> Result<MigrationId, Problem> {
    if let Ok(id) = prefix.0.parse() {
        return Ok(id);
    }
    let known = client.migrations().await.map_err(|error| error.problem())?;
    let mut ids: Vec<MigrationId> = known.migrations.iter().map(|view| view.id).collect();
    let past = client.history().await.map_err(|error| error.problem())?;
    ids.extend(past.reports.iter().map(|report| report.migration_id));
    ids.retain(|id| id.to_string().starts_with(&prefix.0));
    ids.sort();
    ids.dedup();
    match ids.as_slice() {
        [id] => Ok(*id),
        [] => Err(Problem::new(ErrorClass::Misuse, format!("no migration has an id that begins with `{}`", prefix.0))
            .with_code("unknown-migration")
            .with_hint("`sealane status` and `sealane history` list them")),
        several => Err(Problem::new(ErrorClass::Misuse, format!("{} migrations have ids that begin with `{}`", several.len(), prefix.0))
            .with_code("ambiguous-migration")
            .with_hint("give more digits")),
    }
}

/// One question to the gateway.
fn ask<T>(flags: &DaemonFlags, question: impl AsyncFnOnce(Client) -> Result<T, ClientError>) -> Result<T, Problem> {
    with_client(flags, async |client| question(client).await.map_err(|error| error.problem()))
}

/// The gateway behind a control socket, if one answers.
pub(super) fn running_gateway(socket: &Path) -> Option<GatewayView> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
    runtime.block_on(Client::new(socket).gateway()).ok()
}

pub(super) fn with_client<T>(flags: &DaemonFlags, work: impl AsyncFnOnce(Client) -> Result<T, Problem>) -> Result<T, Problem> {
    let client = Client::new(socket(flags)?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Problem::new(ErrorClass::Local, format!("cannot start: {error}")))?;
    runtime.block_on(work(client))
}

/// Flag, then environment, then file, then default.
fn socket(flags: &DaemonFlags) -> Result<PathBuf, Problem> {
    let environment = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(socket) = &flags.socket {
        return Ok(socket.clone());
    }
    if let Some(file) = &flags.config {
        return configured(file);
    }
    if let Some(socket) = environment("SEALANE_SOCKET") {
        return Ok(socket);
    }
    if let Some(file) = environment("SEALANE_CONFIG") {
        return configured(&file);
    }
    // The default file may be unreadable for an operator; the default socket then is the best guess.
    let file = Path::new(DEFAULT_FILE);
    Ok(crate::config::load_text_only(file).map_or_else(|_| PathBuf::from(DEFAULT_CONTROL_SOCKET), |config| config.gateway.control_socket))
}

/// An operator needs no access to the keys that the file names.
fn configured(file: &Path) -> Result<PathBuf, Problem> {
    super::config::load_text(file).map(|config| config.gateway.control_socket)
}

/// Runs the daemon in this process until it is told to stop.
pub(super) fn gateway(flags: &super::flags::GatewayFlags) -> Ending {
    let signals = crate::gateway::Signals::listen()?;
    crate::telemetry::init_logging(flags.log_json)
        .map_err(|error| Problem::new(crate::telemetry::ErrorClass::Bug, crate::telemetry::chain(&error)))?;
    crate::gateway::run(super::config::load(&flags.config)?, signals)?;
    Ok(Exit::Done)
}

/// Signs for the gateway at the other end of standard output.
pub(super) fn key_holder() -> Ending {
    crate::gateway::run_key_holder()?;
    Ok(Exit::Done)
}

/// Starts VMMs for the gateway at the other end of standard input.
pub(super) fn launcher() -> Ending {
    crate::gateway::run_launcher()?;
    Ok(Exit::Done)
}
