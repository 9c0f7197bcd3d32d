//! A crowd at the door: strangers who begin handshakes and never go on.

use std::net::UdpSocket;
use std::time::Instant;

use super::*;
use crate::limits;
use crate::transport::congestion::Group;
use crate::transport::steer;
use crate::transport::tls::QuicTls;
use crate::types::LaneIndex;

/// Says the beginning of a handshake, as a gateway would, from a socket of its own.
struct Stranger {
    socket: UdpSocket,
    said: Vec<u8>,
}

impl Stranger {
    /// At the session socket, or at a worker's.
    fn new(tls: &QuicTls, lane: Option<u16>, to: SocketAddr) -> Self {
        let (socket, overheard) = (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        let client = match lane {
            None => config().session_client(tls),
            Some(lane) => {
                let lane = LaneIndex(lane);
                let member = Arc::new(Arc::<Group>::default().join(lane));
                config().lane_client(tls, steer::lane_byte(MIGRATION, lane), 1452, member)
            }
        };
        let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let _connecting = endpoint.connect_with(client, overheard.local_addr().unwrap(), "127.0.0.1").unwrap();
        let mut said = vec![0; 2048];
        let length = tokio::task::block_in_place(|| overheard.recv(&mut said)).unwrap();
        said.truncate(length);
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let stranger = Self { socket, said };
        stranger.say(&stranger.said, to);
        stranger
    }

    fn say(&self, datagram: &[u8], to: SocketAddr) {
        self.socket.send_to(datagram, to).unwrap();
    }

    /// What it said, to the ID that it was answered with.
    fn goes_on(&self, heard: &[u8]) -> Vec<u8> {
        let id = |datagram: &[u8], at: usize| datagram[at..=at + usize::from(datagram[at])].to_vec();
        let (original, own) = (id(&self.said, 5), id(heard, 5 + id(heard, 5).len()));
        let mut goes_on = [&self.said[..5], &own, &self.said[5 + original.len()..]].concat();
        goes_on.resize(self.said.len(), 0);
        goes_on
    }

    fn hears(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 2048];
        let length = tokio::task::block_in_place(|| self.socket.recv(&mut bytes)).ok()?;
        bytes.truncate(length);
        Some(bytes)
    }
}

fn is_retry(datagram: &[u8]) -> bool {
    datagram[0] & 0xf0 == 0xf0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_costs_whoever_means_it_one_round_trip_and_hears_little_itself() {
    let fleet = Fleet::new();
    let (credentials, to_b) = (fleet.gateway("gw-a"), fleet.gateway("gw-b"));
    // As long as the crowd takes to come on a busy machine.
    let patience = Duration::from_secs(120);
    let config = TransportConfig { handshake_timeout: patience, idle_timeout: patience, ..config() };
    let destination = Endpoint::bind(config.clone(), to_b).unwrap();
    let source = Endpoint::bind(config, Arc::clone(&credentials)).unwrap();
    let (tls, address) = (QuicTls::new(credentials).unwrap(), destination.local_address());
    let mut crowds = Vec::new();
    for socket in [None, Some(0), Some(1)] {
        let crowd: Vec<Stranger> = (0..limits::HALF_OPEN_BEFORE_RETRY).map(|_| Stranger::new(&tls, socket, address)).collect();
        let heard: Vec<_> = crowd.iter().map(|one| one.hears().unwrap()).collect();
        assert!(heard.iter().all(|heard| !is_retry(heard)), "there is room: {socket:?}");
        crowds.push((socket, crowd, heard));
    }
    for (socket, crowd, heard_inside) in &crowds {
        let late = Stranger::new(&tls, *socket, address);
        let heard = late.hears().unwrap();
        assert!(is_retry(&heard) && heard.len() * 3 < late.said.len(), "{socket:?}: {} bytes", heard.len());
        // Those who are inside are not told to come again, whatever else they say.
        let inside = &crowd[0];
        while inside.hears().is_some() {}
        inside.say(&inside.said, address);
        assert!(inside.hears().is_none_or(|heard| !is_retry(&heard)), "{socket:?}");
        inside.say(&inside.goes_on(&heard_inside[0]), address);
        assert!(inside.hears().is_none_or(|heard| !is_retry(&heard)), "{socket:?}");
        // A token that is none is no reason to answer.
        let at = 6 + usize::from(late.said[5]) + 1 + usize::from(late.said[6 + usize::from(late.said[5])]);
        let mut forged = late.said.clone();
        assert_eq!(std::mem::replace(&mut forged[at], 5), 0, "no token");
        late.say(&forged, address);
        assert_eq!(late.hears(), None, "{socket:?}");
    }
    // A hello of ours takes two datagrams.
    let began = Instant::now();
    let (ours, theirs) = join_up(&source, &destination, address).await;
    let _gate = theirs.expect_lanes(MIGRATION, 2, Arc::new(|io| Box::pin(lanes::drain(io)))).unwrap();
    for lane in 0..2 {
        within(ours.open_lane(MIGRATION, LaneIndex(lane), lanes::send_forever)).await.unwrap();
    }
    println!("through the crowd in {:?}", began.elapsed());
}
