//! Start and end of the daemon.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::audit::{self, AuditLog, Entry, Event, Outcome};
use crate::config::{self, Config, Policies};
use crate::control::SandboxView;
use crate::engine::{Command, CommonPaths, TotalBandwidth};
use crate::gateway::bundles::{Candidate, Vault};
use crate::gateway::callers::{Callers, Patience};
use crate::gateway::judge::Judge;
use crate::gateway::launcher::Launcher;
use crate::gateway::policies::{entities, read_policies};
use crate::gateway::registry::Registry;
use crate::gateway::sandbox::{self, Account};
use crate::gateway::serve::SocketKind;
use crate::gateway::signals::{Signals, Told};
use crate::gateway::{Gateway, callers, kept, keys, peers, put_class, renewal, serve};
use crate::identity::{Apart, Credentials, IdentityConfig, PostQuantum, Signer, TrustDomainConfig};
use crate::journal::Journal;
use crate::limits;
use crate::policy::PolicySet;
use crate::policy::bundle::BundleError;
use crate::telemetry::{Problem, chain};
use crate::transport::{Endpoint, TransportConfig};
use crate::wire::ErrorClass;

/// How long a shutdown waits for migrations to end.
const SHUTDOWN: Duration = Duration::from_secs(30);

/// How long a refusal of the verifier waits for its handshake to say that it failed.
const UNCLAIMED: Duration = Duration::from_secs(2);
/// How often it is looked for entries of the audit log that are too old.
const PRUNE_EVERY: Duration = Duration::from_secs(3600);
/// How often those who were turned away are summed up in the audit log.
const SUM_UP_EVERY: Duration = Duration::from_secs(5);

/// Runs the gateway that `config` describes until SIGTERM or SIGINT, which are heard from the moment on at which `signals` began.
///
/// # Errors
/// A part cannot be built; nothing was started then. The problem names the part.
pub fn run(config: Config, signals: Signals) -> Result<(), Problem> {
    let account = config.gateway.user.as_deref().map(Account::find).transpose()?;
    // Other processes, before this one gives up that it can start any.
    let launcher = Launcher::begin(&config)?;
    let keys = keys::begin(&config, &launcher)?;
    // How many cores a container may use is not to be seen from inside.
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let transport = TransportConfig::new(config.gateway.listen);
    let sandbox = sandbox::enter(&config, account.as_ref())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(cores)
        .thread_name("gateway")
        .build()
        .map_err(|error| Problem::new(ErrorClass::Local, format!("the runtime cannot be started: {error}")))?;
    runtime.block_on(async {
        let gateway = build(Arc::new(config), transport, Companions { launcher, keys }, sandbox)?;
        live(gateway, signals).await
    })
}

/// Processes that were started while the gateway still could.
struct Companions {
    launcher: Launcher,
    keys: Apart,
}

fn build(config: Arc<Config>, transport: TransportConfig, companions: Companions, sandbox: SandboxView) -> Result<Arc<Gateway>, Problem> {
    let Companions { launcher, keys } = companions;
    let files = renewal::Files::default();
    files.reading(&config);
    let local = |what: &str, error: &dyn std::error::Error| Problem::new(ErrorClass::Local, format!("{what}: {}", chain(error)));
    let identity = |error: crate::identity::IdentityError| Problem::new(error.class(), chain(&error)).with_code("identity");
    // A CRL number never goes back, not even across a restart.
    let remembered = config.gateway.state_directory.join("crl-numbers");
    let credentials = Credentials::load_remembering(identity_config(&config)?, remembered, Some(keys.clone())).map_err(identity)?;
    if let Err(error) = credentials.own_standing() {
        tracing::warn!(error = %chain(&error), "peers will refuse this gateway's own certificate");
    }
    warn_of_unverified(&credentials);
    if let Some(peer) = config.peers.iter().find(|peer| peer.spiffe == credentials.own_id()) {
        let message = format!("peer `{}` has this gateway's own identity `{}`", peer.name, peer.spiffe);
        return Err(Problem::new(ErrorClass::Misuse, message).with_code("configuration"));
    }
    // The journal first: its lock keeps a second gateway from everything that follows.
    let journal = Journal::open(&config.gateway.state_directory.join("state.redb")).map_err(|error| local("journal", &error))?;
    let (policies, refused) = first_policies(&config)?;
    let signer = audit_signer(&credentials);
    let audit = AuditLog::open(&config.gateway.audit_directory, credentials.own_id().as_str(), signer)
        .map_err(|error| local("audit log", &error))?;
    if let Some(problem) = refused {
        tracing::error!(why = problem.message, "policy bundle refused; the one that was in force last is in force again");
        let entry = refused_entry(&problem);
        audit.record(&entry).map_err(|error| local("audit log", &error))?;
    }
    let endpoint = Endpoint::bind(transport, Arc::clone(&credentials)).map_err(|error| local("listening port", &error))?;
    let registry = Registry::new(config.limits.migrations_max, config.migration.parallel);
    let bandwidth = config.migration.bandwidth_total.map(|limit| TotalBandwidth::new(limit.bytes_per_second));
    Ok(Arc::new(Gateway {
        judge: Arc::new(Judge::new(Arc::clone(&config), policies, audit.clone())),
        config,
        credentials,
        endpoint,
        journal: Arc::new(journal),
        audit,
        registry: Arc::new(registry),
        launcher,
        keys,
        sandbox,
        peers: peers::Reachability::default(),
        taken_up: tokio::sync::Notify::new(),
        proposals: tokio::sync::Mutex::default(),
        bandwidth,
        paths: CommonPaths::default(),
        crowd: Arc::default(),
        kept: kept::KeptTwins::default(),
        files,
        reloading: tokio::sync::Mutex::default(),
    }))
}

/// A forged CRL is refused when it is read only where its issuer is known.
fn warn_of_unverified(credentials: &Credentials) {
    let mut unverified: Vec<_> = credentials.unverified_crls().iter().map(|path| path.display().to_string()).collect();
    // A file can have several.
    unverified.dedup();
    if !unverified.is_empty() {
        let why = "nobody knows their issuers here, so their signatures are checked with each peer's chain";
        tracing::warn!(crls = ?unverified, why, "`intermediates` of their `[[identity.trust]]` says who the issuers are");
    }
}

fn identity_config(config: &Config) -> Result<IdentityConfig, Problem> {
    let trust = |trust: &config::Trust| TrustDomainConfig {
        domain: trust.domain.clone(),
        roots: trust.roots.clone(),
        crls: trust.crls.clone(),
        intermediates: trust.intermediates.clone(),
    };
    Ok(IdentityConfig {
        certificate: config.identity.certificate.clone(),
        key: keys::place("key", &config.identity.key)?,
        signing_key: keys::place("signing_key", &config.identity.signing_key)?,
        trust: config.identity.trust.iter().map(trust).collect(),
        post_quantum: if config.identity.require_post_quantum { PostQuantum::Required } else { PostQuantum::Preferred },
    })
}

/// The policies to start with. Where the bundle is refused, they are of the one that was in force last, and the reason comes along.
fn first_policies(config: &Config) -> Result<(PolicySet, Option<Problem>), Problem> {
    let problem = match load_policies(config).and_then(|fresh| fresh.keep(config)) {
        Ok(policies) => return Ok((policies, None)),
        Err(problem) => problem,
    };
    let Policies::Bundle(wanted) = &config.policy else { return Err(problem) };
    match Vault::new(&config.gateway.state_directory).last_good(wanted, &entities(config)) {
        Ok(Some(last)) => Ok((last.policies, Some(problem))),
        Ok(None) => Err(problem),
        Err(error) => Err(Problem { message: format!("{}; the bundle that was in force last: {error}", problem.message), ..problem }),
    }
}

/// Policies that were found good, and the bundle that they are from.
struct Fresh {
    policies: PolicySet,
    candidate: Option<Candidate>,
}

impl Fresh {
    /// Remembers the bundle; from then on no older one is taken.
    fn keep(self, config: &Config) -> Result<PolicySet, Problem> {
        if let Some(candidate) = &self.candidate {
            Vault::new(&config.gateway.state_directory).keep(candidate).map_err(|error| bundle_refused(config, &error))?;
            tracing::info!(bundle = ?self.policies.bundle(), signed_by = ?candidate.signers(), "policy bundle in force");
        }
        Ok(self.policies)
    }
}

fn bundle_refused(config: &Config, error: &BundleError) -> Problem {
    let place = if let Policies::Bundle(wanted) = &config.policy { wanted.directory.display().to_string() } else { String::new() };
    Problem::new(ErrorClass::Misuse, format!("{error} (`{place}`)"))
        .with_code(error.fault.code())
        .with_hint("`sealane policy bundle verify` says the same without starting anything")
}

/// Reads every `*.cedar` of the policy directory, or the bundle.
fn load_policies(config: &Config) -> Result<Fresh, Problem> {
    let directory = match &config.policy {
        Policies::Directory(directory) => directory,
        Policies::Bundle(wanted) => {
            let candidate = Vault::new(&config.gateway.state_directory).candidate(wanted, &entities(config));
            let candidate = candidate.map_err(|error| bundle_refused(config, &error))?;
            return Ok(Fresh { policies: candidate.policies.clone(), candidate: Some(candidate) });
        }
    };
    let files = read_policies(directory)
        .map_err(|(path, error)| Problem::new(ErrorClass::Local, format!("policy `{}`: {error}", path.display())).with_code("policy"))?;
    let policies = PolicySet::parse(&files, &entities(config)).map_err(|errors| {
        Problem::new(ErrorClass::Misuse, format!("policies in `{}` are not usable:\n{errors}", directory.display()))
            .with_code("policy")
            .with_hint("`sealane policy check` says the same without starting anything")
    })?;
    for problem in policies.lint().into_iter().filter(|problem| problem.defect) {
        tracing::warn!(%problem, "a policy that nobody means");
    }
    Ok(Fresh { policies, candidate: None })
}

/// What the audit log says of a policy set in force.
fn put_policies(entry: &mut Entry, policies: &PolicySet) {
    entry.detail.insert("policy_digest".into(), crate::gateway::judge::hex(&policies.digest()).into());
    if let Some(bundle) = policies.bundle() {
        entry.detail.insert("bundle".into(), bundle.name.clone().into());
        entry.detail.insert("bundle_version".into(), bundle.version.into());
        entry.detail.insert("bundle_expires".into(), bundle.expires.clone().into());
    }
}

/// Code of a problem with certificates or CRLs.
const IDENTITY: &str = "identity";

/// What was read and is not put in force.
fn refused_entry(problem: &Problem) -> Entry {
    let event = if problem.code == IDENTITY { Event::IdentityRefused } else { Event::PolicyRefused };
    let mut entry = Entry::new(event).outcome(Outcome::Refused);
    // Policies can have more mistakes than a line has room for.
    let why: String = problem.message.chars().take(limits::REASON_BYTES_MAX).collect();
    entry.detail.insert("why".into(), why.into());
    entry.detail.insert("code".into(), problem.code.clone().into());
    entry
}

async fn live(gateway: Arc<Gateway>, mut signals: Signals) -> Result<(), Problem> {
    let local = |what: &str, error: std::io::Error| Problem::new(ErrorClass::Local, format!("{what}: {error}"));
    let mut entry = Entry::new(Event::GatewayStarted).outcome(Outcome::Done);
    entry.detail.insert("version".into(), env!("CARGO_PKG_VERSION").into());
    entry.detail.insert("incarnation".into(), gateway.journal.incarnation().to_string().into());
    entry.detail.insert("sandbox".into(), serde_json::to_value(&gateway.sandbox).unwrap_or_default());
    put_policies(&mut entry, &gateway.judge.policies());
    gateway.audit.record(&entry).map_err(|error| Problem::new(ErrorClass::Local, chain(&error)))?;
    gateway.recover().await;

    let path = gateway.config.gateway.control_socket.clone();
    let listener = serve::bind(&path).map_err(|error| local(&format!("control socket `{}`", path.display()), error))?;
    let mut sockets = vec![(path, listener, SocketKind::Control)];
    if let Some(path) = gateway.config.gateway.view_socket.clone() {
        let listener = serve::bind(&path).map_err(|error| local(&format!("view socket `{}`", path.display()), error))?;
        sockets.push((path, listener, SocketKind::View));
    }
    let (stop_in, stop) = tokio::sync::watch::channel(false);
    let mut served = tokio::task::JoinSet::new();
    let mut paths = Vec::new();
    let everybody = Callers::new(Patience::default());
    for (path, listener, kind) in sockets {
        served.spawn(callers::serve(listener, kind, serve::routes(Arc::clone(&gateway)), Arc::clone(&everybody), stop.clone()));
        paths.push(path);
    }
    let accepting = tokio::spawn(Arc::clone(&gateway).accept_sessions());
    let mut background = vec![tokio::spawn(Arc::clone(&gateway).record_refusals()), tokio::spawn(Arc::clone(&gateway).follow_peers())];
    if gateway.config.gateway.watch_files {
        background.push(tokio::spawn(Arc::clone(&gateway).follow_files()));
    }
    tracing::info!(name = %gateway.config.gateway.name, spiffe = %gateway.credentials.own_id(), listen = %gateway.endpoint.local_address(), "ready");
    // Without systemd there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    while signals.next().await == Told::Reload {
        // The log says what came of it.
        drop(gateway.reload().await);
    }
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    gateway.settle().await;
    stop_in.send_replace(true);
    let _ = tokio::time::timeout(Duration::from_secs(2), served.join_all()).await;
    accepting.abort();
    background.iter().for_each(tokio::task::JoinHandle::abort);
    gateway.endpoint.shutdown().await;
    gateway.note(Entry::new(Event::GatewayStopped).outcome(Outcome::Done)).await;
    paths.iter().for_each(|path| drop(std::fs::remove_file(path)));
    Ok(())
}

impl Gateway {
    /// Certificates, CRLs and policies are read again: all of them or none. Peers of migrations under way are judged by them.
    ///
    /// # Errors
    /// One of them is not good; what was in force stays in force.
    pub(super) async fn reload(self: &Arc<Self>) -> Result<(), Problem> {
        let _one = self.reloading.lock().await;
        let gateway = Arc::clone(self);
        let reloaded = tokio::task::spawn_blocking(move || {
            gateway.files.reading(&gateway.config);
            let policies = load_policies(&gateway.config)?.keep(&gateway.config)?;
            gateway.credentials.reload().map_err(|error| Problem::new(error.class(), chain(&error)).with_code(IDENTITY))?;
            warn_of_unverified(&gateway.credentials);
            gateway.judge.replace(policies);
            Ok::<_, Problem>(gateway.judge.policies())
        })
        .await
        .unwrap_or_else(|error| Err(Problem::new(ErrorClass::Bug, format!("reload: {error}"))));
        let mut entry = Entry::new(Event::PolicyLoaded).outcome(Outcome::Done);
        match &reloaded {
            Ok(policies) => {
                tracing::info!(bundle = ?policies.bundle(), "certificates, CRLs and policies read again");
                put_policies(&mut entry, policies);
                self.check_peers();
            }
            Err(problem) => {
                tracing::error!(why = problem.message, "reload refused; what was in force stays in force");
                entry = refused_entry(problem);
            }
        }
        self.note(entry).await;
        reloaded.map(drop)
    }

    /// Whoever TLS turned away is recorded where the handshake failed, with what the verifier remembers; what nobody took is recorded here.
    async fn record_refusals(self: Arc<Self>) {
        let mut tick = tokio::time::interval(Duration::from_millis(200));
        let mut summed_up = Instant::now();
        let mut pruned = None;
        let mut said = Vec::new();
        loop {
            tick.tick().await;
            for (event, why) in self.lost() {
                if !said.contains(&why) {
                    said.push(why);
                    tracing::error!("{why}");
                    self.note(Entry::new(event).outcome(Outcome::Failed).detail("why", why)).await;
                }
            }
            self.tend_audit_log(&mut pruned).await;
            if summed_up.elapsed() >= SUM_UP_EVERY {
                summed_up = Instant::now();
                self.record_turned_away().await;
            }
            for refusal in self.credentials.drain_refusals(UNCLAIMED) {
                if self.crowd.attempt(&None, Instant::now()) {
                    self.note(crate::gateway::refusal_entry(refusal)).await;
                }
            }
        }
    }

    /// Other programs find the tiles of the last entries, and entries that are too old go.
    async fn tend_audit_log(&self, pruned: &mut Option<Instant>) {
        let audit = self.audit.clone();
        let keep = self.config.gateway.audit_keep.filter(|_| pruned.is_none_or(|last| last.elapsed() >= PRUNE_EVERY));
        if keep.is_some() {
            *pruned = Some(Instant::now());
        }
        let tended = tokio::task::spawn_blocking(move || {
            audit.publish();
            keep.map(|keep| jiff::Timestamp::now().checked_sub(keep.duration))
                .and_then(Result::ok)
                .map_or(Ok(()), |before| audit.prune(before).map(drop))
        });
        if let Ok(Err(error)) = tended.await {
            tracing::warn!(error = %chain(&error), "audit log: not tended");
        }
    }

    /// Those who came too often are in the log as a number.
    async fn record_turned_away(&self) {
        for (who, count) in self.crowd.turned_away() {
            let mut entry = Entry::new(Event::SessionRefused).outcome(Outcome::Refused);
            entry.peer = who.map(|spiffe| spiffe.to_string());
            entry.detail.insert("count".into(), count.into());
            entry.detail.insert("why".into(), "too many sessions at once or in a row".into());
            put_class(&mut entry, ErrorClass::PeerMisbehaved);
            self.note(entry).await;
        }
    }

    /// Migrations under way end: those before COMMIT are cancelled, those after are left to finish.
    async fn settle(self: &Arc<Self>) {
        let under_way = self.registry.close();
        for migration in &under_way {
            if let Some(commands) = &migration.commands {
                // A migration that ends by itself at this moment does not listen any more.
                let _ = commands.try_send(Command::Cancel);
            }
        }
        let all = async {
            // One that waits for a peer's word may wait for ever; its journal keeps it.
            for mut migration in under_way.into_iter().filter(|migration| migration.commands.is_some()) {
                let _ = migration.ended.wait_for(|ended| *ended).await;
            }
        };
        if tokio::time::timeout(SHUTDOWN, all).await.is_err() {
            tracing::error!("migrations are still under way; their journals decide at the next start");
        }
    }
}

/// Signs checkpoints with the gateway's key, under its identity.
pub(crate) fn audit_signer(credentials: &Credentials) -> Arc<dyn audit::Signer> {
    Arc::new(AuditSigner { signer: credentials.signer(), name: credentials.own_id().to_string() })
}

struct AuditSigner {
    signer: Arc<Signer>,
    name: String,
}

impl audit::Signer for AuditSigner {
    fn sign(&self, message: &[u8]) -> Result<[u8; 64], String> {
        self.signer.sign(message).map_err(|error| format!("signing key: {error}"))
    }

    fn public_key(&self) -> [u8; 32] {
        self.signer.public_key()
    }

    fn name(&self) -> &str {
        &self.name
    }
}
