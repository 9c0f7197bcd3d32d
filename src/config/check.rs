//! Every rule of the file. A function reads one table, says all that is wrong with it, and gives a
//! value only if nothing is.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::disks::disks;
use super::problem::ConfigError;
use super::raw::{FileKind, FileMention, Located, Reader, Section};
use super::settings::{Config, Gateway, Incoming, Limits, Migration, Operator, PLACEHOLDERS, Peer, Policies, PolicyBundle, Template, Vm};
use super::{ByteSize, Classification, Compression, Durability, Label, Role, Sandboxing, TimeSpan};
use crate::limits::{
    HISTORY_COUNT_MAX, LANES_MAX, MIGRATIONS_MAX, QEMU_CHANNELS_MAX, RAM_BYTES_MAX, SOCKET_PATH_BYTES_MAX, TABLE_BYTES, TABLE_BYTES_MAX,
};
use crate::policy::bundle::BundleTrust;
use crate::types::{PeerName, SpiffeId, Verify, VmName, VmUuid};

/// A configuration that is complete in itself; files that it names are still to be looked at.
pub(super) struct Draft {
    pub(super) reader: Reader,
    config: Option<Config>,
}

impl Draft {
    /// The configuration, or all problems.
    pub(super) fn finish(mut self) -> Result<Config, ConfigError> {
        self.reader.outcome()?;
        match self.config {
            Some(config) => Ok(Config { settings: self.reader.settings, ..config }),
            None => {
                // INVARIANT(all-at-once): whatever withheld the value has said why; this line is the net under it.
                self.reader.problem(0, "", "a required value is missing".to_owned(), None);
                self.reader.outcome()?;
                Err(ConfigError::Invalid { file: self.reader.file, problems: Vec::new() })
            }
        }
    }
}

pub(super) fn draft(text: &str, file: &Path) -> Draft {
    let mut reader = Reader::new(text, file);
    let table = reader.root(text);
    let mut top = Reader::top(&table);
    let r = &mut reader;

    let gateway = gateway(r, &mut top);
    let identity = super::identity::identity(r, &mut top);
    let policy = policy(r, &mut top);
    let migration = migration(r, &mut top);
    let trusted = identity.as_ref().map(|identity| identity.trust.iter().map(|trust| trust.domain.clone()).collect::<BTreeSet<_>>());
    let peers = peers(r, &mut top, gateway.as_ref(), trusted.as_ref());
    // Without all sites, a reference to one cannot be judged.
    let sites = gateway
        .as_ref()
        .zip(peers.as_ref())
        .map(|(gateway, peers)| peers.iter().map(|peer| peer.site.clone()).chain([gateway.site.clone()]).collect::<BTreeSet<Label>>());
    let templates = templates(r, &mut top);
    let vms = vms(r, &mut top, gateway.as_ref(), sites.as_ref(), templates.as_deref());
    let incoming = incoming(r, &mut top);
    let operators = operators(r, &mut top);
    let limits = limits(r, &mut top);
    r.finish(top);

    let whole = || {
        Some(Config {
            file: file.to_owned(),
            gateway: gateway?,
            identity: identity?,
            policy: policy?,
            migration,
            peers: peers?,
            vms: vms?,
            incoming: incoming.ok()?,
            templates: templates?,
            operators: operators?,
            limits,
            settings: Vec::new(),
        })
    };
    let config = whole();
    Draft { reader, config }
}

fn gateway(r: &mut Reader, top: &mut Section<'_, '_>) -> Option<Gateway> {
    let mut s = r.section(top, "gateway");
    let name = r.required::<PeerName>(&mut s, "name");
    let site = r.required::<Label>(&mut s, "site");
    let listen = r.or(&mut s, "listen", ([127, 0, 0, 1], 4433).into());
    let control_socket = r.or(&mut s, "control_socket", PathBuf::from(super::DEFAULT_CONTROL_SOCKET));
    socket_length(r, &s.key("control_socket"), &control_socket, 0);
    let view_socket = r.optional::<PathBuf>(&mut s, "view_socket");
    if let Some(path) = &view_socket {
        socket_length(r, &s.key("view_socket"), path, 0);
    }
    let state_directory = r.or(&mut s, "state_directory", PathBuf::from("/var/lib/sealane")).value;
    let audit_directory = r.or(&mut s, "audit_directory", PathBuf::from("/var/log/sealane/audit")).value;
    let audit_keep = r.optional(&mut s, "audit_keep").map(|keep| keep.value);
    let runtime_directory = r.or(&mut s, "runtime_directory", PathBuf::from("/run/sealane"));
    // Room for `/incoming-` + a migration's 32 digits + `.sock`.
    socket_length(r, &s.key("runtime_directory"), &runtime_directory, 48);
    let watch_files = r.or(&mut s, "watch_files", true).value;
    let user = r.optional::<String>(&mut s, "user");
    let sandbox = r.or(&mut s, "sandbox", Sandboxing::Auto).value;
    r.finish(s);
    Some(Gateway {
        name: name?.value,
        site: site?.value,
        listen: listen.value,
        control_socket: control_socket.value,
        view_socket: view_socket.map(|path| path.value),
        state_directory,
        audit_directory,
        audit_keep,
        runtime_directory: runtime_directory.value,
        user: user.map(|user| user.value),
        sandbox,
        watch_files,
    })
}

fn socket_length(r: &mut Reader, key: &str, path: &Located<PathBuf>, room: usize) {
    let most = SOCKET_PATH_BYTES_MAX - room;
    let length = path.value.as_os_str().len();
    if length > most {
        let message = format!("expected a path of at most {most} bytes for a Unix socket, got {length}");
        r.problem(path.at, key, message, Some("use a shorter path, e.g. below /run".to_owned()));
    }
}

pub(super) fn file(r: &mut Reader, s: &mut Section<'_, '_>, key: &'static str, kind: FileKind) -> Option<Located<PathBuf>> {
    let path = r.required::<PathBuf>(s, key)?;
    r.mentions.push(FileMention { key: s.key(key), at: path.at, path: path.value.clone(), kind });
    Some(path)
}

fn policy(r: &mut Reader, top: &mut Section<'_, '_>) -> Option<Policies> {
    let mut s = r.section(top, "policy");
    let bundle = r.optional::<PathBuf>(&mut s, "bundle");
    let Some(bundle) = bundle else {
        let directory = r.or(&mut s, "directory", PathBuf::from("/etc/sealane/policy.d"));
        let (key, path) = (s.key("directory"), directory.value.clone());
        r.mentions.push(FileMention { key, at: directory.at, path, kind: FileKind::PolicyDirectory });
        r.finish(s);
        return Some(Policies::Directory(directory.value));
    };
    if let Some(directory) = r.optional::<PathBuf>(&mut s, "directory") {
        let hint = "policies come from a signed bundle or from a directory that is taken as it is".to_owned();
        r.problem(directory.at, &s.key("directory"), "`bundle` is there too, expected one of the two".to_owned(), Some(hint));
    }
    let (key, path) = (s.key("bundle"), bundle.value.clone());
    r.mentions.push(FileMention { key, at: bundle.at, path, kind: FileKind::PolicyBundle });
    let name = r.required::<String>(&mut s, "bundle_name");
    let keys = r.required::<Vec<String>>(&mut s, "keys");
    // All of them, unless fewer are said to do.
    let all = keys.as_ref().map_or(1, |keys| u32::try_from(keys.value.len()).unwrap_or(u32::MAX));
    let threshold = r.or(&mut s, "threshold", all);
    let (name, keys) = (name.map(|name| name.value), keys);
    let pinned = name.zip(keys).and_then(|(name, keys)| {
        let threshold = usize::try_from(threshold.value).unwrap_or(usize::MAX);
        match BundleTrust::new(&name, &keys.value, threshold) {
            Ok(_) => Some(PolicyBundle { directory: bundle.value, name, keys: keys.value, threshold }),
            Err(what) => {
                r.problem(keys.at, &s.key("keys"), what, None);
                None
            }
        }
    });
    r.finish(s);
    pinned.map(Policies::Bundle)
}

fn migration(r: &mut Reader, top: &mut Section<'_, '_>) -> Migration {
    let mut s = r.section(top, "migration");
    let lanes = r.or(&mut s, "lanes", 2_u16);
    between(r, &s, "lanes", &lanes, 1, LANES_MAX);
    let channels = r.or(&mut s, "channels", 1_u16);
    between(r, &s, "channels", &channels, 1, QEMU_CHANNELS_MAX);
    let compression = r.or(&mut s, "compression", Compression::Auto).value;
    let max_downtime = r.or(&mut s, "max_downtime", TimeSpan { duration: Duration::from_millis(300) });
    let timeout = r.or(&mut s, "timeout", TimeSpan { duration: Duration::from_secs(3600) });
    let max_outage = r.or(&mut s, "max_outage", TimeSpan { duration: Duration::from_secs(600) });
    for (key, span) in [("max_downtime", &max_downtime), ("timeout", &timeout), ("max_outage", &max_outage)] {
        if span.value.duration.is_zero() {
            r.problem(span.at, &s.key(key), "expected more than zero".to_owned(), None);
        }
    }
    let keep_disks = r.or(&mut s, "keep_disks", TimeSpan { duration: Duration::from_secs(3600) }).value;
    let verify = r.or(&mut s, "verify", Verify::Yes).value;
    let tables = r.or(&mut s, "tables", ByteSize { bytes: TABLE_BYTES as u64 });
    if tables.value.bytes > TABLE_BYTES_MAX {
        let most = ByteSize { bytes: TABLE_BYTES_MAX };
        r.problem(tables.at, &s.key("tables"), format!("expected at most {most}, got {}", tables.value), None);
    }
    let bandwidth = r.optional(&mut s, "bandwidth").map(|bandwidth| bandwidth.value);
    let bandwidth_total = r.optional(&mut s, "bandwidth_total").map(|bandwidth| bandwidth.value);
    let parallel = r.or(&mut s, "parallel", 8);
    between(r, &s, "parallel", &parallel, 1, MIGRATIONS_MAX);
    let durability = r.or(&mut s, "durability", Durability::None).value;
    r.finish(s);
    Migration {
        lanes: lanes.value,
        channels: channels.value,
        compression,
        max_downtime: max_downtime.value,
        timeout: timeout.value,
        max_outage: max_outage.value,
        keep_disks,
        verify,
        tables: tables.value,
        bandwidth,
        bandwidth_total,
        parallel: parallel.value,
        durability,
    }
}

fn between<N: PartialOrd + std::fmt::Display + Copy>(
    r: &mut Reader,
    s: &Section<'_, '_>,
    key: &str,
    number: &Located<N>,
    least: N,
    most: N,
) {
    if number.value < least || number.value > most {
        r.problem(number.at, &s.key(key), format!("expected {least} to {most}, got {}", number.value), None);
    }
}

pub(super) fn unique<T: std::fmt::Display>(
    r: &mut Reader,
    s: &Section<'_, '_>,
    key: &str,
    value: Option<&Located<T>>,
    seen: &mut HashMap<String, usize>,
    what: &str,
) {
    let Some(value) = value else { return };
    let text = value.value.to_string();
    let line = r.place(value.at).0;
    match seen.get(&text) {
        Some(first) => r.problem(value.at, &s.key(key), format!("{what} `{text}` is used already on line {first}"), None),
        None => {
            seen.insert(text, line);
        }
    }
}

fn peers(r: &mut Reader, top: &mut Section<'_, '_>, gateway: Option<&Gateway>, trusted: Option<&BTreeSet<String>>) -> Option<Vec<Peer>> {
    let (mut names, mut identities) = (HashMap::new(), HashMap::new());
    let mut peers = Some(Vec::new());
    for mut s in r.sections(top, "peer") {
        let name = r.required::<PeerName>(&mut s, "name");
        unique(r, &s, "name", name.as_ref(), &mut names, "peer name");
        if let (Some(name), Some(gateway)) = (&name, gateway)
            && name.value == gateway.name
        {
            r.problem(name.at, &s.key("name"), format!("`{}` is this gateway's own name", name.value), None);
        }
        let address = r.required(&mut s, "address");
        let spiffe = r.required::<SpiffeId>(&mut s, "spiffe");
        unique(r, &s, "spiffe", spiffe.as_ref(), &mut identities, "identity");
        if let (Some(spiffe), Some(trusted)) = (&spiffe, trusted)
            && !trusted.contains(spiffe.value.trust_domain())
        {
            let message = format!("trust domain `{}` has no `[[identity.trust]]`", spiffe.value.trust_domain());
            let known: Vec<_> = trusted.iter().map(String::as_str).collect();
            r.problem(spiffe.at, &s.key("spiffe"), message, Some(format!("trusted here: {}", known.join(", "))));
        }
        let site = r.required(&mut s, "site");
        let groups = r.or(&mut s, "groups", Vec::new()).value;
        r.finish(s);
        let peer = || Some(Peer { name: name?.value, address: address?.value, spiffe: spiffe?.value, site: site?.value, groups });
        peers = peers.zip(peer()).map(|(mut peers, peer)| {
            peers.push(peer);
            peers
        });
    }
    peers
}

fn vms(
    r: &mut Reader,
    top: &mut Section<'_, '_>,
    gateway: Option<&Gateway>,
    sites: Option<&BTreeSet<Label>>,
    templates: Option<&[Template]>,
) -> Option<Vec<Vm>> {
    let mut seen = [HashMap::new(), HashMap::new(), HashMap::new()];
    let mut vms = Some(Vec::new());
    for s in r.sections(top, "vm") {
        let vm = vm(r, s, gateway, sites, templates, &mut seen);
        vms = vms.zip(vm).map(|(mut vms, vm)| {
            vms.push(vm);
            vms
        });
    }
    vms
}

fn vm(
    r: &mut Reader,
    mut s: Section<'_, '_>,
    gateway: Option<&Gateway>,
    sites: Option<&BTreeSet<Label>>,
    templates: Option<&[Template]>,
    [names, uuids, sockets]: &mut [HashMap<String, usize>; 3],
) -> Option<Vm> {
    let name = r.required::<VmName>(&mut s, "name");
    unique(r, &s, "name", name.as_ref(), names, "VM name");
    let uuid = r.required::<VmUuid>(&mut s, "uuid");
    unique(r, &s, "uuid", uuid.as_ref(), uuids, "UUID");
    let [socket, qmp, incoming_qmp] = ["socket", "qmp", "incoming_qmp"].map(|key| {
        let socket = r.optional::<PathBuf>(&mut s, key);
        if let Some(socket) = &socket {
            socket_length(r, &s.key(key), socket, 0);
            let shown = Located { value: socket.value.display().to_string(), at: socket.at };
            unique(r, &s, key, Some(&shown), sockets, "socket");
        }
        socket
    });
    let template = r.optional::<Label>(&mut s, "template");
    known_template(r, &s, template.as_ref(), templates);
    either(r, &s, ["socket", "qmp"], socket.is_some(), qmp.as_ref());
    either(r, &s, ["template", "incoming_qmp"], template.is_some(), incoming_qmp.as_ref());
    let tenant = r.required::<Label>(&mut s, "tenant");
    let classification = r.required::<Classification>(&mut s, "classification");
    let home = gateway.map(|gateway| gateway.site.clone());
    let home_site = match home {
        Some(home) => Some(r.or(&mut s, "home_site", home)),
        None => r.optional(&mut s, "home_site"),
    };
    let allowed = home_site.iter().map(|site| site.value.clone()).collect();
    let allowed_sites = r.or::<Vec<Label>>(&mut s, "allowed_sites", allowed);
    if let Some(sites) = sites {
        if let Some(site) = &home_site {
            known_site(r, &s.key("home_site"), &site.value, site.at, sites);
        }
        for (index, site) in allowed_sites.value.iter().enumerate() {
            known_site(r, &format!("{}[{index}]", s.key("allowed_sites")), site, allowed_sites.at, sites);
        }
    }
    let migratable = r.or(&mut s, "migratable", true).value;
    let postcopy_ok = r.or(&mut s, "postcopy_ok", false).value;
    let groups = r.or(&mut s, "groups", Vec::new()).value;
    let vcpus = r.optional(&mut s, "vcpus").map(|vcpus| vcpus.value);
    let devices = r.optional(&mut s, "devices").map(|devices| devices.value);
    let machine = machine_digest(r, &mut s);
    let disks = disks(r, &mut s);
    r.finish(s);
    Some(Vm {
        name: name?.value,
        uuid: uuid?.value,
        socket: socket.map(|socket| socket.value),
        qmp: qmp.map(|qmp| qmp.value),
        template: template.map(|template| template.value),
        incoming_qmp: incoming_qmp.map(|qmp| qmp.value),
        tenant: tenant?.value,
        classification: classification?.value,
        home_site: home_site?.value,
        allowed_sites: allowed_sites.value,
        migratable,
        postcopy_ok,
        groups,
        vcpus,
        devices,
        machine,
        disks: disks?,
    })
}

fn machine_digest(r: &mut Reader, s: &mut Section<'_, '_>) -> Option<String> {
    let machine = r.optional::<String>(s, "machine")?;
    if machine.value.len() != 64 || !machine.value.bytes().all(is_lower_hex) {
        let hint = "`sealane audit show` has it as `machine` of `migration-offered`".to_owned();
        r.problem(machine.at, &s.key("machine"), "expected 64 digits of lower-case hex".to_owned(), Some(hint));
    }
    Some(machine.value)
}

fn is_lower_hex(byte: u8) -> bool {
    byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)
}

fn known_template(r: &mut Reader, s: &Section<'_, '_>, template: Option<&Located<Label>>, templates: Option<&[Template]>) {
    let (Some(template), Some(templates)) = (template, templates) else { return };
    let names: Vec<_> = templates.iter().map(|template| template.name.as_str()).collect();
    if !names.contains(&template.value.as_str()) {
        let hint =
            if names.is_empty() { "there is no `[[template]]` here".to_owned() } else { format!("templates here: {}", names.join(", ")) };
        r.problem(template.at, &s.key("template"), format!("unknown template `{}`", template.value), Some(hint));
    }
}

/// One of two keys, not both.
fn either(r: &mut Reader, s: &Section<'_, '_>, [one, other]: [&str; 2], has_one: bool, found: Option<&Located<PathBuf>>) {
    if let Some(found) = found.filter(|_| has_one) {
        r.problem(found.at, &s.key(other), format!("expected either `{one}` or `{other}`, got both"), None);
    }
}

fn known_site(r: &mut Reader, key: &str, site: &Label, at: usize, sites: &BTreeSet<Label>) {
    if !sites.contains(site) {
        let known: Vec<_> = sites.iter().map(Label::as_str).collect();
        let hint = format!("sites of this gateway and its peers: {}", known.join(", "));
        r.problem(at, key, format!("unknown site `{site}`"), Some(hint));
    }
}

/// `Err` when the table is there and wrong.
fn incoming(r: &mut Reader, top: &mut Section<'_, '_>) -> Result<Option<Incoming>, ()> {
    let mut s = r.section(top, "incoming");
    if !s.is_present() {
        return Ok(None);
    }
    let command = r.required::<Vec<String>>(&mut s, "command");
    if let Some(command) = &command {
        placeholders(r, &s.key("command"), command);
    }
    let max_memory = max_memory(r, &mut s);
    r.finish(s);
    command.map(|command| Some(Incoming { command: command.value, max_memory })).ok_or(())
}

fn max_memory(r: &mut Reader, s: &mut Section<'_, '_>) -> ByteSize {
    let max_memory = r.or(s, "max_memory", ByteSize { bytes: 64 << 30 });
    if max_memory.value.bytes == 0 || max_memory.value.bytes > RAM_BYTES_MAX {
        let most = ByteSize { bytes: RAM_BYTES_MAX };
        r.problem(max_memory.at, &s.key("max_memory"), format!("expected 1B to {most}, got {}", max_memory.value), None);
    }
    max_memory.value
}

fn templates(r: &mut Reader, top: &mut Section<'_, '_>) -> Option<Vec<Template>> {
    let mut names = HashMap::new();
    let mut templates = Some(Vec::new());
    for mut s in r.sections(top, "template") {
        let name = r.required::<Label>(&mut s, "name");
        unique(r, &s, "name", name.as_ref(), &mut names, "template name");
        let command = r.required::<Vec<String>>(&mut s, "command");
        if let Some(command) = &command {
            placeholders(r, &s.key("command"), command);
            if !command.value.windows(2).any(|pair| pair == ["-incoming", "defer"]) {
                let hint = "a QEMU without them would boot instead of waiting for the guest".to_owned();
                r.problem(command.at, &s.key("command"), "expected `-incoming` and `defer` among the arguments".to_owned(), Some(hint));
            }
        }
        let max_memory = max_memory(r, &mut s);
        r.finish(s);
        let template = || Some(Template { name: name?.value, command: command?.value, max_memory });
        templates = templates.zip(template()).map(|(mut templates, template)| {
            templates.push(template);
            templates
        });
    }
    templates
}

fn placeholders(r: &mut Reader, key: &str, command: &Located<Vec<String>>) {
    let known = PLACEHOLDERS.map(|name| format!("{{{name}}}")).join(", ");
    if command.value.first().is_none_or(|program| program.is_empty() || program.contains('{')) {
        r.problem(command.at, key, "expected a program as the first element".to_owned(), None);
    }
    for (index, argument) in command.value.iter().enumerate() {
        let mut rest = argument.as_str();
        while let Some((before, after)) = rest.split_once('{') {
            let name = after.split_once('}');
            let wrong = before.contains('}') || name.is_none_or(|(name, _)| !PLACEHOLDERS.contains(&name));
            if wrong {
                let message = format!("unknown placeholder in `{}`", argument.escape_debug());
                r.problem(command.at, &format!("{key}[{index}]"), message, Some(format!("placeholders: {known}")));
                break;
            }
            rest = name.map_or("", |(_, tail)| tail);
        }
    }
    if !command.value.iter().any(|argument| argument.contains("{socket}")) {
        r.problem(command.at, key, "expected `{socket}` in one of the arguments".to_owned(), Some(format!("placeholders: {known}")));
    }
}

fn operators(r: &mut Reader, top: &mut Section<'_, '_>) -> Option<Vec<Operator>> {
    let (mut names, mut uids) = (HashMap::new(), HashMap::new());
    let mut operators = Some(Vec::new());
    for mut s in r.sections(top, "operator") {
        let name = r.required::<Label>(&mut s, "name");
        unique(r, &s, "name", name.as_ref(), &mut names, "operator name");
        let uid = r.required::<u32>(&mut s, "uid");
        unique(r, &s, "uid", uid.as_ref(), &mut uids, "user id");
        let teams = r.or(&mut s, "teams", Vec::new()).value;
        let mfa = r.or(&mut s, "mfa", false).value;
        let roles = r.required::<Vec<Role>>(&mut s, "roles");
        if let Some(roles) = roles.as_ref().filter(|roles| roles.value.is_empty()) {
            r.problem(roles.at, &s.key("roles"), format!("expected at least one of {}", Role::EXPECTED), None);
        }
        r.finish(s);
        let operator = || Some(Operator { name: name?.value, uid: uid?.value, teams, mfa, roles: roles?.value });
        operators = operators.zip(operator()).map(|(mut operators, operator)| {
            operators.push(operator);
            operators
        });
    }
    operators
}

fn limits(r: &mut Reader, top: &mut Section<'_, '_>) -> Limits {
    let mut s = r.section(top, "limits");
    let migrations_max = r.or(&mut s, "migrations_max", 16);
    between(r, &s, "migrations_max", &migrations_max, 1, MIGRATIONS_MAX);
    let history_max = r.or(&mut s, "history_max", 1000);
    between(r, &s, "history_max", &history_max, 1, HISTORY_COUNT_MAX);
    r.finish(s);
    Limits { migrations_max: migrations_max.value, history_max: history_max.value }
}
