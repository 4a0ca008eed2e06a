//! I/O of the client: passes time and datagrams to the client and carries out its outputs.

use std::io;
use std::net::Ipv6Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use common::signal::{Code, MigrationProgress, MigrationReady, MigrationResponse};

use crate::GoArgs;
use crate::client::{Agent, Client, ClientError, Event, Timing};
use crate::identifier::{self, Secret};
use crate::interface::{self, Interface};
use crate::mobile::Mobile;
use crate::net::{Net, Wake};
use crate::nic::{IdleNic, Plan};
use crate::view::{self, MoveReport, PhaseReport, SearchReport, View};
use linux::netlink::Netlink;
use linux::random;

/// Longest time that the migration waits until all correspondents know the new address. Without a
/// mapping server they never do.
const KNOWN: Duration = Duration::from_secs(2);
/// Pause before the first repetition of the question to the node; doubles each time.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// Number of abort datagrams after an interrupt. A datagram may be lost, and no agent answers an
/// abort.
const ABORTS: u32 = 3;

/// Runs `migkick search`: prints the agent of this host.
pub(crate) fn search(json: bool) -> anyhow::Result<()> {
    let mut session = Session::open(None)?;
    let agent = session.find()?;
    let report = SearchReport {
        interface: session.name_of(agent.ifindex),
        agent: agent.name,
        address: agent.address,
        domain: agent.domain,
        destinations: agent.destinations,
    };
    drop(session);
    view::print(&report, json, SearchReport::rows)?;
    Ok(())
}

/// Runs `migkick go`: migrates this VM and prints a report.
pub(crate) fn go(args: &GoArgs) -> anyhow::Result<()> {
    let mut session = Session::open(args.idle_interface.as_deref())?;
    // Parsed before the first request: a missing secret must not end a migration half-way.
    let secret = args.secret.as_deref().map(Secret::parse).transpose()?;
    let agent = session.find()?;
    let idle = session.idle(&agent, args)?;
    if let (Some(_), None) = (&idle, secret)
        && args.interface_identifier == identifier::Scheme::StablePrivacy
    {
        Secret::of_machine()?;
    }
    let searched = session.now();
    session.view.step("Asking for the move");
    session
        .client
        .request(searched, args.destination.clone(), args.domain.clone());
    let response = session.response()?;
    let responded = session.now();
    let nic = match idle {
        None => Nic::None,
        Some(interface) => match prepare(args, secret, interface, &response) {
            Ok(nic) => nic,
            Err(error) => {
                let reason = format!("The VM cannot prepare its idle NIC: {error:#}");
                session.abort(Code::FAILED, &reason);
                return Err(error);
            }
        },
    };
    let (idle_interface, mut address) = nic.name_and_address();
    let mut ready = MigrationReady {
        address: address.map(|it| it.octets().into()),
        ..MigrationReady::default()
    };
    let nic = match nic {
        Nic::OfNode(mobile) => {
            session
                .view
                .step("Letting correspondents know the new address");
            ready = session.until_known(*mobile)?;
            // The node takes another one where the first belongs to somebody.
            address = ready.address.map(|it| Ipv6Addr::from(*it));
            None
        }
        Nic::Own(nic) => Some(*nic),
        Nic::None => None,
    };
    let prepared = session.now();
    session.client.ready(prepared, ready);
    let progress = session.completion()?;
    let completed = session.now();
    let phase = |phase, from: Duration, to: Duration| PhaseReport {
        phase,
        ms: to.saturating_sub(from).as_secs_f64() * 1000.0,
    };
    let report = MoveReport {
        interface: session.name_of(agent.ifindex),
        domain: agent.domain,
        source: agent.name,
        destination: args.destination.clone(),
        idle_interface,
        address,
        elapsed_ms: progress.elapsed_ms,
        vm_pause_ms: progress.vm_pause_ms,
        processed_bytes: progress.processed_bytes,
        phases: vec![
            phase("search", Duration::ZERO, searched),
            phase("signalling", searched, responded),
            phase("prepare", responded, prepared),
            phase("migrate", prepared, completed),
        ],
    };
    for error in nic.map(IdleNic::settle).unwrap_or_default() {
        session
            .view
            .note(&format!("{:#}", anyhow::Error::new(error)));
    }
    match session.mobile.take().map(Mobile::completed) {
        Some(Ok(false)) => session.view.note(
            "The VM's node waits for an answer at the new address before it switches; `migkick node status` shows how it goes on",
        ),
        Some(Err(error)) => session
            .view
            .note(&format!("{:#}", anyhow::Error::new(error))),
        Some(Ok(true)) | None => {}
    }
    drop(session);
    view::print(&report, args.json, MoveReport::rows)?;
    Ok(())
}

/// Who configured the idle NIC.
enum Nic {
    None,
    /// This program configured it.
    Own(Box<IdleNic>),
    /// The local node configured it.
    OfNode(Box<Mobile>),
}

impl Nic {
    fn name_and_address(&self) -> (Option<String>, Option<Ipv6Addr>) {
        match self {
            Self::None => (None, None),
            Self::Own(nic) => (Some(nic.name().to_owned()), Some(nic.plan_address())),
            Self::OfNode(mobile) => (Some(mobile.name().to_owned()), Some(mobile.address())),
        }
    }
}

fn prepare(
    args: &GoArgs,
    secret: Option<Secret>,
    interface: Interface,
    response: &MigrationResponse,
) -> anyhow::Result<Nic> {
    if let Some(mobile) = Mobile::prepare(args, &interface, response)? {
        return Ok(Nic::OfNode(Box::new(mobile)));
    }
    let agent_address = Ipv6Addr::from(*response.agent_address);
    let prefix = Ipv6Addr::from(*response.prefix);
    let length = response.prefix_length;
    if length > 128 || prefix.is_multicast() || prefix.is_unicast_link_local() {
        bail!(
            "The agent named {prefix}/{length}, which is no prefix for a VM; set agent.prefix at the destination"
        );
    }
    let address = identifier::address(
        args.interface_identifier,
        || secret.map_or_else(Secret::of_machine, Ok),
        (prefix, length),
        interface.mac,
        agent_address,
    )?;
    let plan = Plan {
        address,
        prefix_length: length,
        agent_address,
        router: None,
    };
    let netlink = Netlink::open().context("Cannot open a netlink socket")?;
    let nic = IdleNic::prepare(netlink, interface, plan)?;
    Ok(Nic::Own(Box::new(nic)))
}

/// State that lives as long as the program.
struct Session {
    start: Instant,
    interfaces: Vec<Interface>,
    net: Net,
    client: Client,
    view: View,
    /// Local node that takes part in the migration.
    mobile: Option<Mobile>,
    /// Last error of a send.
    send_error: Option<String>,
}

impl Session {
    /// Finds the NICs and starts the search. `idle` names the idle NIC on the command line.
    fn open(idle: Option<&str>) -> anyhow::Result<Self> {
        let start = Instant::now();
        let mut netlink = Netlink::open().context("Cannot open a netlink socket")?;
        let mut interfaces = interface::list(&mut netlink).context("Cannot list the NICs")?;
        interfaces.sort_by_key(|interface| Some(interface.name.as_str()) == idle);
        let up: Vec<Interface> = interfaces.iter().filter(|i| i.up).cloned().collect();
        if up.is_empty() {
            bail!("No Ethernet NIC is up; set one up with `ip link set eth0 up`");
        }
        let net =
            Net::open(&up).context("Cannot open a socket on each NIC; run migkick as root")?;
        let indexes = up.iter().map(|interface| interface.ifindex).collect();
        let transactions = transactions().context("Cannot read random numbers")?;
        Ok(Self {
            start,
            interfaces,
            net,
            client: Client::new(start.elapsed(), Timing::default(), indexes, transactions),
            view: View::new(),
            mobile: None,
            send_error: None,
        })
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn name_of(&self, ifindex: u32) -> String {
        self.interfaces
            .iter()
            .find(|interface| interface.ifindex == ifindex)
            .map_or_else(|| ifindex.to_string(), |interface| interface.name.clone())
    }

    fn find(&mut self) -> anyhow::Result<Agent> {
        self.view.step("Searching for the agent");
        match self.until(|event| matches!(event, Event::Found(_)))? {
            Event::Found(agent) => Ok(agent),
            event => bail!("Out of order: {event:?}"),
        }
    }

    fn response(&mut self) -> anyhow::Result<MigrationResponse> {
        match self.until(|event| matches!(event, Event::Prepared(_)))? {
            Event::Prepared(response) => Ok(response),
            event => bail!("Out of order: {event:?}"),
        }
    }

    fn completion(&mut self) -> anyhow::Result<MigrationProgress> {
        match self.until(|event| matches!(event, Event::Completed(_)))? {
            Event::Completed(progress) => Ok(progress),
            event => bail!("Out of order: {event:?}"),
        }
    }

    /// Returns the NIC to configure; `None` without one, or when the user wants none.
    fn idle(&self, agent: &Agent, args: &GoArgs) -> anyhow::Result<Option<Interface>> {
        if args.no_configure {
            return Ok(None);
        }
        // With both NICs on one link, the agent may have answered by either.
        let of_node = Mobile::active()?;
        let is_active = |it: &Interface| match &of_node {
            Some(name) => it.name == *name,
            None => it.ifindex == agent.ifindex,
        };
        if let Some(name) = &args.idle_interface {
            let found = self.interfaces.iter().find(|i| i.name == *name);
            return match found {
                None => bail!("There is no Ethernet NIC {name}; `ip link` shows which there are"),
                Some(interface) if is_active(interface) => {
                    bail!("{name} is the active NIC; name the other one")
                }
                Some(interface) => Ok(Some(interface.clone())),
            };
        }
        let idle = self.interfaces.iter().find(|it| !is_active(it));
        if idle.is_none() {
            self.view.note(
                "This VM has no second NIC, so it gets no address of the destination's network",
            );
        }
        Ok(idle.cloned())
    }

    /// Waits at most [`KNOWN`] until the node's correspondents know its new address; returns the
    /// message for the agents.
    fn until_known(&mut self, mobile: Mobile) -> anyhow::Result<MigrationReady> {
        let deadline = self.now() + KNOWN;
        let mut pause = FIRST_PAUSE;
        self.mobile = Some(mobile);
        loop {
            let Some(mobile) = &mut self.mobile else {
                bail!("Out of order: no node");
            };
            let asked = match mobile.is_known() {
                Ok(false) if self.start.elapsed() + pause < deadline => Ok(None),
                Ok(_) => mobile.ready().map(Some),
                Err(error) => Err(error),
            };
            match asked {
                Ok(Some(ready)) => return Ok(ready),
                Ok(None) => {}
                Err(error) => {
                    let reason = format!("The VM's node is not ready: {error}");
                    self.abort(Code::FAILED, &reason);
                    return Err(error.into());
                }
            }
            let until = self.now() + pause;
            while self.now() < until {
                if let Some(event) = self.turn(until, |_| false)? {
                    bail!("Out of order: {event:?}");
                }
            }
            pause *= 2;
        }
    }

    /// Runs until a wanted event; shows all other events.
    fn until(&mut self, wanted: impl Fn(&Event) -> bool) -> anyhow::Result<Event> {
        loop {
            if let Some(event) = self.turn(Duration::MAX, &wanted)? {
                return Ok(event);
            }
        }
    }

    /// Carries out the client's outputs, then waits once for input, at most until `deadline`.
    fn turn(
        &mut self,
        deadline: Duration,
        wanted: impl Fn(&Event) -> bool,
    ) -> anyhow::Result<Option<Event>> {
        self.flush();
        while let Some(event) = self.client.poll_event() {
            if let (Some(mobile), Event::Progress(progress)) = (&mut self.mobile, &event)
                && let Some(ready) = mobile.progress(progress)
            {
                self.client.say_ready(self.start.elapsed(), ready);
            }
            match event {
                Event::Failed(error) => {
                    match (&mut self.mobile, &error) {
                        (Some(mobile), ClientError::Aborted(reason)) => {
                            mobile.refused(reason.code);
                        }
                        (Some(mobile), _) => mobile.lost(),
                        (None, _) => {}
                    }
                    return Err(self.explain(error));
                }
                event if wanted(&event) => return Ok(Some(event)),
                Event::Progress(progress) => self.view.progress(&progress),
                _ => {}
            }
        }
        let next = self.client.poll_timeout().unwrap_or(Duration::MAX);
        let patience = next.min(deadline).saturating_sub(self.now());
        match self
            .net
            .wait(patience)
            .context("Cannot receive datagrams")?
        {
            Wake::Interrupted => {
                self.abort(Code::CANCELLED, "Interrupted in the VM");
                if let Some(mobile) = &mut self.mobile {
                    mobile.lost();
                }
                bail!("Interrupted; the agent was told to stop the move");
            }
            Wake::Datagrams(datagrams) => {
                for datagram in datagrams {
                    let now = self.now();
                    self.client.handle_datagram(
                        now,
                        datagram.ifindex,
                        datagram.from,
                        &datagram.bytes,
                    );
                }
            }
        }
        self.client.handle_timeout(self.now());
        Ok(None)
    }

    fn flush(&mut self) {
        while let Some(transmit) = self.client.poll_transmit() {
            let sent = self.net.send(&transmit);
            self.send_error = sent.err().map(|error| error.to_string());
        }
    }

    fn abort(&mut self, code: Code, reason: &str) {
        self.client.abort(code, reason);
        while let Some(transmit) = self.client.poll_transmit() {
            for _ in 0..ABORTS {
                // A failure needs no handling: the agent's own deadline ends the migration.
                let _ = self.net.send(&transmit);
            }
        }
    }

    fn explain(&self, error: ClientError) -> anyhow::Error {
        let ClientError::NoAgent { .. } = error else {
            return error.into();
        };
        let up = self.interfaces.iter().filter(|interface| interface.up);
        let names: Vec<&str> = up.map(|interface| interface.name.as_str()).collect();
        let error = anyhow::Error::new(ClientError::NoAgent {
            interfaces: names.join(", "),
        });
        match &self.send_error {
            Some(reason) => {
                anyhow::anyhow!("{error} (the last datagram could not be sent: {reason})")
            }
            None => error,
        }
    }
}

/// Two random transactions, which no other run has.
fn transactions() -> io::Result<(u64, u64)> {
    Ok((random::number()?, random::number()?))
}

#[cfg(test)]
mod tests;
