//! The control API on its Unix socket. The kernel says who calls; each verb says who may.

use std::convert::Infallible;
use std::os::unix::fs::PermissionsExt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use axum::extract::connect_info::ConnectInfo;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use hyper::body::Frame;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};

use crate::config::Role;
use crate::control::{
    self, DoubtList, Event, GatewayView, History, MigrateRequest, MigrationList, MigrationState, MigrationView, PeerList, PeerView,
    PlanView, ResolutionView, ResolveRequest, SetRequest, VmList, VmState, VmView, paths,
};
use crate::engine::{self, Command, Placement, Standing};
use crate::gateway::Gateway;
use crate::gateway::host::inspect;
use crate::gateway::judge::hex;
use crate::gateway::registry::Migration;
use crate::gateway::resolution::record_view;
use crate::hypervisor::Address;
use crate::hypervisor::RunState;
use crate::limits;
use crate::telemetry::{Outcome, Problem, Progress, Report};
use crate::types::{Epoch, MigrationId, Side};
use crate::wire::ErrorClass;

/// Who is at the other end of a connection, as the kernel says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Caller {
    pub(super) uid: Option<u32>,
    pub(super) kind: SocketKind,
}

/// What a socket is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SocketKind {
    /// Every verb, by the caller's roles.
    Control,
    /// Verbs that change nothing, for whoever may open it, and nothing else for anybody.
    View,
}

/// A refusal as an answer.
pub(super) struct Refused(pub(super) Problem);

impl From<Problem> for Refused {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(control::status_of(&self.0)).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, [(header::CONTENT_TYPE, "application/problem+json")], Json(self.0)).into_response()
    }
}

type Answer<T> = Result<Json<T>, Refused>;
type Shared = State<Arc<Gateway>>;

/// The socket, bound with the mode that lets only the owner and its group in.
pub(super) fn bind(path: &std::path::Path) -> std::io::Result<UnixListener> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    // A socket that nobody listens on is left from a gateway that died; the journal's lock says that we are alone.
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => return Err(std::io::Error::new(std::io::ErrorKind::AddrInUse, "another gateway listens there")),
        Err(_) => match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        },
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

/// Every verb.
pub(super) fn routes(gateway: Arc<Gateway>) -> Router {
    Router::new()
        .route(paths::GATEWAY, get(gateway_view))
        .route(paths::RELOAD, post(reload))
        .route(paths::VMS, get(vms))
        .route(paths::PEERS, get(peers))
        .route(paths::MIGRATIONS, get(migrations).post(start))
        .route(paths::MIGRATION, get(migration))
        .route(paths::EVENTS, get(events))
        .route(paths::CANCEL, post(cancel))
        .route(paths::SET, post(set))
        .route(paths::DOUBTS, get(doubts))
        .route(paths::RESOLVE, post(resolve))
        .route(paths::PLAN, post(plan))
        .route(paths::HISTORY, get(history))
        .fallback(|| async {
            Refused(Problem::new(ErrorClass::Misuse, "no such path in this version of the API").with_code("unknown-path"))
        })
        .with_state(gateway)
}

impl Gateway {
    /// May this user use verbs of this role? Root and the gateway's own user may everything.
    pub(super) fn may(&self, uid: u32, needs: Role) -> bool {
        let roles = self.config.operator(uid).map(|operator| operator.roles.as_slice()).unwrap_or_default();
        let has_role = match needs {
            Role::Viewer => !roles.is_empty(),
            Role::Operator => roles.iter().any(|role| matches!(role, Role::Operator | Role::Admin)),
            Role::Admin => roles.contains(&Role::Admin),
        };
        has_role || uid == 0 || uid == nix::unistd::geteuid().as_raw()
    }

    /// May this caller use verbs of this role?
    fn authorise(&self, caller: Caller, needs: Role) -> Result<u32, Refused> {
        let Some(uid) = caller.uid else {
            return Err(Problem::new(ErrorClass::Unauthenticated, "the kernel does not say who calls").into());
        };
        if caller.kind == SocketKind::View && needs != Role::Viewer {
            let message = "this socket only shows: whoever calls, nothing is changed through it".to_owned();
            return Err(Problem::new(ErrorClass::Denied, message).with_hint("use `gateway.control_socket`").into());
        }
        if caller.kind == SocketKind::View || self.may(uid, needs) {
            Ok(uid)
        } else {
            Err(Problem::new(ErrorClass::Denied, format!("user id {uid} may not do this: it needs the role `{needs}`"))
                .with_hint("an [[operator]] entry in the gateway's configuration gives roles")
                .into())
        }
    }

    /// A migration of this run of the gateway, or a finished one of an earlier run.
    async fn find(self: &Arc<Self>, id: &str) -> Result<Migration, Refused> {
        let id = identifier(id)?;
        if let Some(found) = self.registry.migration(id) {
            return Ok(found);
        }
        let gateway = Arc::clone(self);
        let past = tokio::task::spawn_blocking(move || gateway.past(id)).await.map_err(super::outgoing::bug)?;
        past.ok_or_else(|| Problem::new(ErrorClass::Misuse, format!("no migration `{id}` here")).with_code("unknown-migration").into())
    }

    fn past(&self, id: MigrationId) -> Option<Migration> {
        let kept = self.journal.history().ok()?;
        let reported =
            kept.iter().filter_map(|bytes| serde_json::from_slice::<Report>(bytes).ok()).find(|report| report.migration_id == id);
        // A gateway that died between the last record and the report still has the record.
        let journaled = || {
            let about = engine::interruption(&self.evidence(), id).ok()??;
            let outcome = about.outcome?;
            Some(self.settled_report(id, about, outcome))
        };
        let report = reported.or_else(journaled)?;
        let (ids, own) = (&report.authenticated, self.credentials.own_id());
        let (side, other) = if ids.destination.as_ref() == Some(&own) {
            (Side::Destination, ids.source.as_ref())
        } else {
            (Side::Source, ids.destination.as_ref())
        };
        let known = other.and_then(|spiffe| self.config.peer_of(spiffe)).map(|peer| peer.name.clone());
        Some(Migration {
            id,
            vm: report.vm.clone(),
            // A peer that was never authenticated has no name in the report.
            peer: known.or_else(|| "unknown".parse().ok())?,
            side,
            started: std::time::SystemTime::UNIX_EPOCH,
            progress: watch::channel(Progress::new(id)).1,
            report: Some(Arc::new(report)),
            ended: watch::channel(true).1,
            commands: None,
            returns: None,
        })
    }
}

/// A body of at most `CONTROL_REQUEST_BYTES_MAX` bytes; what is wrong with it is said with its place.
fn read<T: DeserializeOwned>(body: &Bytes) -> Result<T, Refused> {
    serde_json::from_slice(body).map_err(|error| Problem::new(ErrorClass::Misuse, format!("request: {error}")).into())
}

async fn gateway_view(State(gateway): Shared, ConnectInfo(caller): ConnectInfo<Caller>) -> Answer<GatewayView> {
    gateway.authorise(caller, Role::Viewer)?;
    let queued = gateway.registry.queued();
    let active = gateway.registry.migrations().iter().filter(|migration| migration.report.is_none()).count().saturating_sub(queued);
    let expires = jiff::Timestamp::try_from(gateway.credentials.own_not_after()).ok();
    Ok(Json(GatewayView {
        schema: Default::default(),
        name: gateway.config.gateway.name.clone(),
        site: gateway.config.gateway.site.to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        spiffe: Some(gateway.credentials.own_id()),
        listen: gateway.endpoint.local_address().to_string(),
        incarnation: gateway.journal.incarnation(),
        certificate_expires: expires.map(|time| time.to_string()),
        policy_digest: Some(hex(&gateway.judge.policies().digest())),
        migrations_active: u32::try_from(active).unwrap_or(u32::MAX),
        migrations_queued: u32::try_from(queued).unwrap_or(u32::MAX),
        sandbox: Some(gateway.sandbox.clone()),
        impaired: Some(gateway.lost())
            .filter(|lost| !lost.is_empty())
            .map(|lost| lost.iter().map(|(_, why)| *why).collect::<Vec<_>>().join("; ")),
    }))
}

async fn reload(state: State<Arc<Gateway>>, caller: ConnectInfo<Caller>) -> Answer<GatewayView> {
    state.authorise(caller.0, Role::Admin)?;
    state.reload().await?;
    gateway_view(state, caller).await
}

async fn vms(State(gateway): Shared, ConnectInfo(caller): ConnectInfo<Caller>) -> Answer<VmList> {
    gateway.authorise(caller, Role::Viewer)?;
    // Asking VMMs blocks; one that hangs must not stop the runtime.
    let view_all = move || {
        let owners =
            engine::owners(&gateway.evidence()).inspect_err(|error| tracing::error!(error = %crate::telemetry::chain(error), "why"));
        let owners = owners.unwrap_or_default();
        gateway.config.vms.iter().map(|vm| vm_view(&gateway, vm, owners.get(&vm.name))).collect()
    };
    let views = tokio::task::spawn_blocking(view_all).await.map_err(super::outgoing::bug)?;
    Ok(Json(VmList { schema: Default::default(), vms: views }))
}

/// What is said of a guest that was split and gets no pages.
const LACKS_PAGES: &str = "it was split, and lacks pages of its memory that its source has: they follow as soon as both gateways and both QEMUs \
    are there; if the source's QEMU is gone they are lost, and the VM has to be started from its disks, once this QEMU has ended";

fn vm_view(gateway: &Gateway, vm: &crate::config::Vm, standing: Option<&Standing>) -> VmView {
    let moving = gateway.registry.moving(&vm.name);
    let mut view = VmView {
        name: vm.name.clone(),
        uuid: vm.uuid,
        state: VmState::Gone,
        place: "unknown".to_owned(),
        driver: String::new(),
        owner_epoch: Epoch::default(),
        memory_bytes: None,
        vcpus: None,
        why: None,
    };
    let place = gateway.registry.place(&vm.name);
    match place.clone() {
        Some(Placement::Here { address, epoch, .. }) => {
            view.place = "here".to_owned();
            view.owner_epoch = epoch;
            // A QEMU's monitor has one client at a time, and while it moves that is the migration.
            let busy = moving.is_some() && matches!(Address::parse(&address), Address::Qemu(_));
            match inspect(&Address::parse(&address), vm.name.as_str()) {
                Err(_) if busy => view.state = VmState::Leaving,
                Ok((machine, status, lacks_pages)) => {
                    if let Some(machine) = machine {
                        view.memory_bytes = Some(machine.regions.iter().map(|region| region.bytes).sum());
                        view.vcpus = Some(machine.vcpus);
                        view.driver = machine.kind;
                    }
                    view.state = match (status.state, moving) {
                        (RunState::Running | RunState::Incoming, _) if lacks_pages => VmState::LacksPages,
                        (RunState::Running, Some(_)) => VmState::Leaving,
                        (RunState::Running, None) => VmState::Running,
                        (RunState::Paused | RunState::Incoming, _) => VmState::Paused,
                        (RunState::Ended, _) => VmState::Ended,
                    };
                    let lacks = (view.state == VmState::LacksPages).then(|| LACKS_PAGES.to_owned());
                    view.why = lacks.or_else(|| status.exit_code.map(|code| format!("the guest ended with code {code}")));
                }
                Err(error) => {
                    view.state = VmState::Unreachable;
                    view.why = Some(crate::telemetry::chain(&error));
                }
            }
        }
        Some(Placement::Given { peer, epoch, .. }) => {
            view.state = VmState::InDoubt;
            view.place = peer.to_string();
            view.owner_epoch = epoch;
        }
        Some(Placement::Cold { epoch }) => {
            view.state = VmState::Cold;
            view.place = "here".to_owned();
            view.owner_epoch = epoch;
        }
        Some(Placement::Away { peer, epoch }) => {
            view.place = gateway.config.peer_of(&peer).map_or_else(|| peer.to_string(), |peer| peer.name.to_string());
            view.owner_epoch = epoch;
        }
        None => {
            view.why = Some("not attached: no `socket` in the configuration, and it has not arrived".to_owned());
        }
    }
    if let (VmState::Gone, Some(migration)) = (view.state, moving) {
        view.state = VmState::Arriving;
        view.why = Some(format!("arriving in migration `{migration}`"));
    }
    gateway.explain(&mut view, place.as_ref(), standing);
    view
}

async fn peers(State(gateway): Shared, ConnectInfo(caller): ConnectInfo<Caller>) -> Answer<PeerList> {
    gateway.authorise(caller, Role::Viewer)?;
    // Each is asked now; a peer that is down costs its connect timeout once, as they are asked side by side.
    let asked: Vec<_> =
        gateway.config.peers.iter().cloned().map(|peer| (peer.clone(), tokio::spawn(probe(Arc::clone(&gateway), peer)))).collect();
    let mut peers = Vec::with_capacity(asked.len());
    for (peer, task) in asked {
        let _ = task.await;
        let last = gateway.peers.last(&peer.name);
        peers.push(PeerView {
            name: peer.name,
            address: peer.address.to_string(),
            spiffe: peer.spiffe,
            site: peer.site.to_string(),
            reachable: last.as_ref().map(Result::is_ok),
            rtt_seconds: last.as_ref().and_then(|last| last.as_ref().ok()).map(std::time::Duration::as_secs_f64),
            why: last.and_then(Result::err),
        });
    }
    Ok(Json(PeerList { schema: Default::default(), peers }))
}

async fn probe(gateway: Arc<Gateway>, peer: crate::config::Peer) {
    if let Ok(link) = gateway.dial(&peer).await {
        link.session.close(None, "probe");
    }
}

fn view(migration: &Migration) -> MigrationView {
    let state = match migration.report.as_ref().map(|report| report.state) {
        None => MigrationState::Active,
        Some(Outcome::Completed) => MigrationState::Completed,
        Some(Outcome::Failed) => MigrationState::Failed,
        Some(Outcome::Cancelled) => MigrationState::Cancelled,
        Some(Outcome::InDoubt) => MigrationState::InDoubt,
    };
    MigrationView {
        schema: Default::default(),
        id: migration.id,
        vm: migration.vm.clone(),
        peer: migration.peer.clone(),
        side: migration.side,
        state,
        progress: migration.report.is_none().then(|| migration.progress.borrow().clone()),
        report: migration.report.as_deref().cloned(),
        records: Vec::new(),
    }
}

async fn migrations(State(gateway): Shared, ConnectInfo(caller): ConnectInfo<Caller>) -> Answer<MigrationList> {
    gateway.authorise(caller, Role::Viewer)?;
    let mut all = gateway.registry.migrations();
    all.sort_by_key(|migration| (migration.report.is_some(), std::cmp::Reverse(migration.started)));
    Ok(Json(MigrationList { schema: Default::default(), migrations: all.iter().map(view).collect() }))
}

async fn migration(State(gateway): Shared, ConnectInfo(caller): ConnectInfo<Caller>, Path(id): Path<String>) -> Answer<MigrationView> {
    gateway.authorise(caller, Role::Viewer)?;
    let found = gateway.find(&id).await?;
    let mut view = view(&found);
    let interrupted = view.state == MigrationState::Active && found.commands.is_none();
    if interrupted || matches!(view.state, MigrationState::InDoubt | MigrationState::Failed) {
        let notes =
            tokio::task::spawn_blocking(move || engine::notes(&gateway.evidence(), found.id)).await.map_err(super::outgoing::bug)?;
        let notes = notes.map_err(|error| Problem::new(ErrorClass::Local, crate::telemetry::chain(&error)))?;
        view.records = notes.iter().map(record_view).collect();
    }
    Ok(Json(view))
}

async fn doubts(State(gateway): Shared, ConnectInfo(caller): ConnectInfo<Caller>) -> Answer<DoubtList> {
    gateway.authorise(caller, Role::Viewer)?;
    Ok(Json(gateway.doubts().await?))
}

async fn resolve(
    State(gateway): Shared,
    ConnectInfo(caller): ConnectInfo<Caller>,
    Path(id): Path<String>,
    body: Bytes,
) -> Answer<ResolutionView> {
    let uid = gateway.authorise(caller, Role::Operator)?;
    let request: ResolveRequest = read(&body)?;
    // A client that leaves must not leave a decision half made.
    let step = tokio::spawn(async move { gateway.resolve(uid, identifier(&id)?, request).await });
    Ok(Json(step.await.map_err(super::outgoing::bug)??))
}

fn identifier(id: &str) -> Result<MigrationId, Problem> {
    id.parse().map_err(|error: crate::types::InvalidValue| Problem::new(ErrorClass::Misuse, error.to_string()))
}

async fn start(State(gateway): Shared, ConnectInfo(caller): ConnectInfo<Caller>, body: Bytes) -> Answer<MigrationView> {
    let uid = gateway.authorise(caller, Role::Operator)?;
    let request: MigrateRequest = read(&body)?;
    let id = gateway.start(uid, &request).await?;
    Ok(Json(view(&gateway.find(&id.to_string()).await?)))
}

async fn plan(State(gateway): Shared, ConnectInfo(caller): ConnectInfo<Caller>, body: Bytes) -> Answer<PlanView> {
    let uid = gateway.authorise(caller, Role::Operator)?;
    let request: MigrateRequest = read(&body)?;
    Ok(Json(gateway.plan(uid, &request).await?))
}

async fn cancel(State(gateway): Shared, ConnectInfo(caller): ConnectInfo<Caller>, Path(id): Path<String>) -> Answer<MigrationView> {
    gateway.authorise(caller, Role::Operator)?;
    let found = gateway.find(&id).await?;
    command(&found, Command::Cancel).await?;
    let mut answer = view(&found);
    if answer.state == MigrationState::Active {
        answer.state = MigrationState::Cancelling;
    }
    Ok(Json(answer))
}

async fn set(
    State(gateway): Shared,
    ConnectInfo(caller): ConnectInfo<Caller>,
    Path(id): Path<String>,
    body: Bytes,
) -> Answer<MigrationView> {
    gateway.authorise(caller, Role::Operator)?;
    let found = gateway.find(&id).await?;
    let change: SetRequest = read(&body)?;
    if let Some(limit) = change.bandwidth_bytes_per_second {
        command(&found, Command::Bandwidth(Some(limit))).await?;
    }
    if let Some(seconds) = change.max_downtime_seconds {
        let downtime = std::time::Duration::try_from_secs_f64(seconds)
            .ok()
            .filter(|downtime| !downtime.is_zero() && *downtime <= limits::MIGRATION_MAX)
            .ok_or_else(|| Problem::new(ErrorClass::Misuse, format!("`max_downtime_seconds` of {seconds}")))?;
        command(&found, Command::DowntimeMax(downtime)).await?;
    }
    Ok(Json(view(&found)))
}

async fn command(migration: &Migration, command: Command) -> Result<(), Refused> {
    let id = migration.id;
    if migration.side == Side::Destination && migration.report.is_none() {
        return Err(
            Problem::new(ErrorClass::Misuse, format!("migration `{id}` is steered at its source, gateway `{}`", migration.peer)).into()
        );
    }
    let ended = || Problem::new(ErrorClass::Misuse, format!("migration `{id}` has ended")).with_code("migration-ended");
    migration.commands.as_ref().ok_or_else(ended)?.send(command).await.map_err(|_| ended())?;
    Ok(())
}

async fn history(State(gateway): Shared, ConnectInfo(caller): ConnectInfo<Caller>) -> Answer<History> {
    gateway.authorise(caller, Role::Viewer)?;
    let journal = Arc::clone(&gateway.journal);
    let kept = tokio::task::spawn_blocking(move || journal.history()).await.map_err(super::outgoing::bug)?;
    let kept = kept.map_err(|error| Problem::new(ErrorClass::Local, crate::telemetry::chain(&error)))?;
    // A report of another version is not shown as something that it is not.
    let reports = kept.iter().filter_map(|bytes| serde_json::from_slice(bytes).ok()).collect();
    Ok(Json(History { schema: Default::default(), reports }))
}

/// Progress as it changes, then the report: JSON lines.
async fn events(State(gateway): Shared, ConnectInfo(caller): ConnectInfo<Caller>, Path(id): Path<String>) -> Result<Response, Refused> {
    gateway.authorise(caller, Role::Viewer)?;
    let found = gateway.find(&id).await?;
    let (lines, body) = mpsc::channel(limits::EVENT_QUEUE_LINES);
    tokio::spawn(follow(gateway, found, lines));
    Ok(([(header::CONTENT_TYPE, "application/jsonl")], Body::new(Lines(body))).into_response())
}

async fn follow(gateway: Arc<Gateway>, mut found: Migration, lines: mpsc::Sender<Bytes>) {
    while !*found.ended.borrow() {
        let progress = found.progress.borrow_and_update().clone();
        if lines.send(line(&Event::Progress(Box::new(progress)))).await.is_err() {
            return;
        }
        tokio::select! {
            changed = found.progress.changed() => if changed.is_err() {
                // The migration is over; its report comes next.
                let _ = found.ended.wait_for(|ended| *ended).await;
            },
            _ = found.ended.changed() => {}
            () = lines.closed() => return,
        }
    }
    let report = gateway.registry.migration(found.id).and_then(|migration| migration.report);
    if let Some(report) = report.or(found.report) {
        // A watcher that left does not need it.
        let _ = lines.send(line(&Event::Report(Box::new(report.as_ref().clone())))).await;
    }
}

fn line(event: &impl Serialize) -> Bytes {
    let mut bytes = serde_json::to_vec(event).unwrap_or_default();
    bytes.push(b'\n');
    bytes.into()
}

/// Lines from a channel as a response body.
struct Lines(mpsc::Receiver<Bytes>);

impl hyper::body::Body for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.get_mut().0.poll_recv(context).map(|line| line.map(|line| Ok(Frame::data(line))))
    }
}
