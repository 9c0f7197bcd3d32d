//! Policies of a directory and what they are told by configuration: one way for the daemon and for `sealane policy`.

use std::io::Read;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use crate::config::{self, Classification, Config, Peer};
use crate::control::Compress;
use crate::gateway::peers;
use crate::identity::{PostQuantum, provider};
use crate::limits;
use crate::policy::{self, Channel, Entities, PolicyFile, Stream};
use crate::types::{Mode, Verify};
use crate::wire::{Compression, CompressionScope, Durability, StreamTerms};

/// Every `*.cedar` of a directory, in order of name; or the path that cannot be read, and why.
pub(crate) fn read_policies(directory: &Path) -> Result<Vec<PolicyFile>, (PathBuf, std::io::Error)> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |error| (path, error)
    };
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(at(directory))? {
        let path = entry.map_err(at(directory))?.path();
        if path.extension().is_some_and(|extension| extension == "cedar") {
            paths.push(path);
        }
    }
    paths.sort();
    let read = |path: PathBuf| {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(PolicyFile { text: read_policy_text(&path).map_err(at(&path))?, name })
    };
    paths.into_iter().map(read).collect()
}

/// A text that is about policy, at most as long as policies may be.
pub(crate) fn read_policy_text(path: &Path) -> std::io::Result<String> {
    let most = limits::POLICY_BYTES_MAX as u64;
    let mut text = String::new();
    std::fs::File::open(path)?.take(most + 1).read_to_string(&mut text)?;
    if text.len() as u64 > most {
        return Err(std::io::Error::other(format!("it has more than {most} bytes")));
    }
    Ok(text)
}

/// What policies know by configuration.
pub(crate) fn entities(config: &Config) -> Entities {
    let labels = |labels: &[config::Label]| labels.iter().map(ToString::to_string).collect();
    Entities {
        gateways: config
            .peers
            .iter()
            .map(|peer| policy::GatewayEntity { spiffe: peer.spiffe.clone(), site: peer.site.to_string(), groups: labels(&peer.groups) })
            .collect(),
        operators: config
            .operators
            .iter()
            .map(|operator| policy::OperatorEntity { id: operator_id(operator.uid), teams: labels(&operator.teams), mfa: operator.mfa })
            .collect(),
        vms: config
            .vms
            .iter()
            .map(|vm| policy::VmEntity {
                uuid: vm.uuid,
                name: vm.name.clone(),
                tenant: vm.tenant.to_string(),
                classification: vm.classification.to_string(),
                home_site: vm.home_site.to_string(),
                allowed_sites: labels(&vm.allowed_sites),
                migratable: vm.migratable,
                postcopy_ok: vm.postcopy_ok,
                groups: labels(&vm.groups),
            })
            .collect(),
    }
}

/// How policies name somebody who comes through the control socket.
pub(crate) fn operator_id(uid: u32) -> String {
    format!("uid:{uid}")
}

/// What the migration of a VM asks of its stream unless its request says otherwise. What is restricted lets no page say
/// anything of another, and hides how much each frame holds.
pub(super) fn default_terms(defaults: &config::Migration, classification: Classification) -> StreamTerms {
    let restricted = classification == Classification::Restricted;
    StreamTerms {
        lanes: defaults.lanes,
        compression: match defaults.compression {
            config::Compression::None => Compression::None,
            config::Compression::Lz4 => Compression::Lz4,
            config::Compression::Zstd => Compression::Zstd,
            config::Compression::Auto => Compression::Auto,
        },
        compression_scope: if restricted { CompressionScope::Page } else { CompressionScope::Stream },
        length_padding: restricted,
        durability: match defaults.durability {
            config::Durability::None => Durability::None,
            config::Durability::Destination => Durability::Destination,
            config::Durability::Both => Durability::Both,
        },
        verify: defaults.verify != Verify::No,
    }
}

/// What a wish means for the stream.
pub(crate) fn compression(wish: Compress) -> Compression {
    match wish {
        Compress::Auto => Compression::Auto,
        Compress::None => Compression::None,
        Compress::Lz4 => Compression::Lz4,
        Compress::Zstd(_) => Compression::Zstd,
    }
}

/// The level of a wish that names one.
pub(crate) fn zstd_level(wish: Compress) -> Option<u8> {
    if let Compress::Zstd(level) = wish { level } else { None }
}

/// The terms of a stream as policies see them.
pub(super) fn stream(terms: &StreamTerms, mode: Mode, storage: policy::Storage) -> Stream {
    Stream {
        mode: match mode {
            Mode::Precopy => policy::Mode::Precopy,
            Mode::Postcopy => policy::Mode::Postcopy,
            Mode::Hybrid => policy::Mode::Hybrid,
        },
        compression: match terms.compression {
            Compression::None => policy::Codec::None,
            Compression::Lz4 => policy::Codec::Lz4,
            Compression::Zstd => policy::Codec::Zstd,
            Compression::Auto => policy::Codec::Auto,
        },
        compression_scope: match terms.compression_scope {
            CompressionScope::Page => policy::CodecScope::Page,
            CompressionScope::Batch => policy::CodecScope::Batch,
            CompressionScope::Stream => policy::CodecScope::Stream,
        },
        length_padding: terms.length_padding,
        durability: match terms.durability {
            Durability::None => policy::Durability::None,
            Durability::Destination => policy::Durability::Dest,
            Durability::Both => policy::Durability::Both,
        },
        lanes: terms.lanes,
        storage,
    }
}

/// The terms, as far as policies have come to see them otherwise: each word of theirs is one of ours.
pub(super) fn obliged(terms: &StreamTerms, stream: &Stream) -> StreamTerms {
    StreamTerms {
        lanes: stream.lanes,
        compression: match stream.compression {
            policy::Codec::None => Compression::None,
            policy::Codec::Lz4 => Compression::Lz4,
            policy::Codec::Zstd => Compression::Zstd,
            policy::Codec::Auto => Compression::Auto,
        },
        compression_scope: match stream.compression_scope {
            policy::CodecScope::Page => CompressionScope::Page,
            policy::CodecScope::Batch => CompressionScope::Batch,
            policy::CodecScope::Stream => CompressionScope::Stream,
        },
        length_padding: stream.length_padding,
        durability: match stream.durability {
            policy::Durability::None => Durability::None,
            policy::Durability::Dest => Durability::Destination,
            policy::Durability::Both => Durability::Both,
        },
        verify: terms.verify,
    }
}

/// The terms that a migration without wishes of its own is judged by.
pub(crate) fn default_stream(config: &Config, vm: &config::Vm) -> Stream {
    stream(&default_terms(&config.migration, vm.classification), Mode::Precopy, policy::Storage::None)
}

/// The address that a request is judged by before the peer was reached.
pub(crate) fn address_of(peer: &Peer) -> IpAddr {
    peers::numeric(&peer.address)
}

/// A channel in good order: what a session with a peer whose certificate and CRL are fresh is judged by.
pub(crate) fn channel_in_order(peer_cert_days_left: i64) -> Channel {
    // As two gateways of this version agree: on what both prefer.
    let provider = provider(PostQuantum::default());
    let group = provider.kx_groups.first().map(|group| format!("{:?}", group.name()));
    let suite = provider.cipher_suites.first().map(|suite| format!("{:?}", suite.suite()));
    let (kx, suite) = (group.unwrap_or_default(), suite.unwrap_or_default());
    Channel { tls: "1.3".to_owned(), kx, suite, crl_fresh: true, peer_cert_days_left }
}
