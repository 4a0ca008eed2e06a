//! Current state of the attachments, read from the kernel because other programs may have changed
//! them.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;

use aya::programs::{ProgramInfo, loaded_programs};
use linux::bpf::link::{chain, exists};
use linux::bpf::pins::remove_link;
use linux::bpf::sys::tcx_programs;

use super::filter::Qdiscs;
use super::hook::{Attachment, Hook, Program};
use super::{Datapath, DatapathError, link, lock};
use crate::net::tc::{Filter, Parent, Qdisc, Side};
use crate::net::xdp;

/// State of an attachment in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookView {
    /// Program that the agent has attached.
    pub program: Program,
    /// Hook of the attachment.
    pub hook: Hook,
    /// Direction of traffic that the program sees.
    pub side: Side,
    /// Qdisc of the filter (`ingress`, `htb 1:`); `None` unless the hook is [`Hook::Filter`].
    pub qdisc: Option<String>,
    /// Programs and filters that see each packet earlier, in order. Each of them may drop a packet.
    pub before: Vec<String>,
    /// False if another program has removed the attachment.
    pub is_there: bool,
}

impl Datapath {
    /// Returns the attachments of this agent, by interface.
    ///
    /// # Errors
    ///
    /// [`DatapathError::TrafficControl`].
    pub fn hooks(&self) -> Result<BTreeMap<u32, Vec<HookView>>, DatapathError> {
        let _hooks = lock(&self.inner.hooks);
        let mut hooks: BTreeMap<u32, Vec<HookView>> = BTreeMap::new();
        let qdiscs = self.qdiscs()?;
        for attachment in self.attachments() {
            let view = self.view(&attachment, &qdiscs).unwrap_or_else(|error| {
                tracing::debug!(ifindex = attachment.ifindex, error, "A hook cannot be read");
                HookView::gone(&attachment)
            });
            hooks.entry(attachment.ifindex).or_default().push(view);
        }
        Ok(hooks)
    }

    /// Returns the programs that were removed from an interface by others, and drops them from the
    /// agent's list. The remaining programs stay.
    ///
    /// # Errors
    ///
    /// [`DatapathError::TrafficControl`], [`DatapathError::Pin`].
    pub fn lost(&self, ifindex: u32) -> Result<Vec<Program>, DatapathError> {
        let _hooks = lock(&self.inner.hooks);
        let mut lost = Vec::new();
        // The programs of a deleted interface were not removed by anybody.
        if !exists(ifindex) {
            return Ok(lost);
        }
        let qdiscs = self.qdiscs()?;
        for attachment in self.attachments() {
            if attachment.ifindex != ifindex || !self.is_gone(&attachment, &qdiscs) {
                continue;
            }
            let program = attachment.program;
            lock(&self.inner.attached).remove(&(program, ifindex));
            lost.push(program);
            // A link detached by force cannot be used again.
            match (attachment.hook, program) {
                (Hook::Filter, _) => {}
                (_, Program::Uplink) => self.unlink_uplink_except(None, ifindex)?,
                _ => remove_link(&self.inner.pins.link(program.name(), ifindex))?,
            }
        }
        Ok(lost)
    }

    /// Checks all attachments. Logs once per attachment the programs in front of it, and returns
    /// the interfaces that have lost a program. Blocks; call it off the runtime.
    ///
    /// # Errors
    ///
    /// [`DatapathError::TrafficControl`].
    pub fn survey(&self) -> Result<BTreeSet<u32>, DatapathError> {
        let _hooks = lock(&self.inner.hooks);
        let mut lost = BTreeSet::new();
        let qdiscs = self.qdiscs()?;
        for attachment in self.attachments() {
            if self.is_gone(&attachment, &qdiscs) {
                lost.insert(attachment.ifindex);
            } else {
                self.warn_of_order(&attachment);
            }
        }
        Ok(lost)
    }

    /// Logs once which programs see packets before an attached program.
    pub(super) fn warn_of_order(&self, attachment: &Attachment) {
        let key = (attachment.program, attachment.ifindex);
        if lock(&self.inner.warned).contains(&key) {
            return;
        }
        let view = self
            .qdiscs()
            .map_err(|error| error.to_string())
            .and_then(|qdiscs| self.view(attachment, &qdiscs));
        let Ok(view) = view else { return };
        if view.before.is_empty() {
            return;
        }
        lock(&self.inner.warned).insert(key);
        tracing::warn!(
            program = attachment.program.name(),
            interface = attachment.interface,
            before = view.before.join(", "),
            "Others see packets first; this program does not see those that they drop"
        );
    }

    /// Returns all qdiscs if programs are attached by filters, otherwise none.
    fn qdiscs(&self) -> Result<Vec<Qdisc>, DatapathError> {
        match self.inner.hook {
            Hook::Filter => lock(&self.inner.filters)
                .all_qdiscs()
                .map_err(DatapathError::TrafficControl),
            _ => Ok(Vec::new()),
        }
    }

    /// True only if the kernel confirms that the program is not attached.
    fn is_gone(&self, attachment: &Attachment, qdiscs: &[Qdisc]) -> bool {
        let view = self.view(attachment, qdiscs);
        view.is_ok_and(|view| !view.is_there)
    }

    /// Returns the name of an XDP program on the interface that is not this agent's.
    pub(super) fn foreign_xdp(&self, ifindex: u32) -> Option<String> {
        let id = xdp::program(ifindex).ok()??;
        (Some(id) != self.own_xdp()).then(|| format!("XDP program {}", label(id)))
    }

    fn view(&self, attachment: &Attachment, qdiscs: &[Qdisc]) -> Result<HookView, String> {
        let before = match (attachment.hook, attachment.parent) {
            (Hook::Filter, Some(parent)) => self.before_filter(attachment, parent, qdiscs)?,
            (Hook::Filter | Hook::Tcx, _) => self.before_tcx(attachment)?,
            (Hook::XdpNative | Hook::XdpGeneric, _) => {
                let there = xdp::program(attachment.ifindex).map_err(|error| chain(&error))?;
                (there.is_some() && there == self.own_xdp()).then(Vec::new)
            }
        };
        let mut view = HookView::gone(attachment);
        view.qdisc = attachment
            .parent
            .map(|parent| qdisc(parent, &Qdiscs::of(qdiscs, attachment.ifindex)));
        let Some(before) = before else {
            return Ok(view);
        };
        view.is_there = true;
        let is_after_xdp =
            view.side == Side::Ingress && matches!(view.hook, Hook::Tcx | Hook::Filter);
        let xdp = is_after_xdp.then(|| self.foreign_xdp(attachment.ifindex));
        view.before = xdp.flatten().into_iter().chain(before).collect();
        Ok(view)
    }

    /// Programs in front of a TCX program; `None` if the program is not attached.
    fn before_tcx(&self, attachment: &Attachment) -> Result<Option<Vec<String>>, String> {
        let text = |error: &dyn Error| chain(error);
        let own = {
            let mut programs = lock(&self.inner.programs);
            let classifier = link::classifier(&mut programs, attachment.program);
            let info = classifier
                .map_err(|error| text(&error))?
                .info()
                .map_err(|error| text(&error))?;
            info.id()
        };
        let is_ingress = attachment.program.side() == Side::Ingress;
        let programs =
            tcx_programs(attachment.ifindex, is_ingress).map_err(|error| text(&error))?;
        let Some(place) = programs.iter().position(|program| *program == own) else {
            return Ok(None);
        };
        let before = programs.into_iter().take(place);
        Ok(Some(before.map(label).collect()))
    }

    /// Filters in front of a filter; `None` if the filter does not exist.
    fn before_filter(
        &self,
        attachment: &Attachment,
        parent: Parent,
        qdiscs: &[Qdisc],
    ) -> Result<Option<Vec<String>>, String> {
        let qdiscs = Qdiscs::of(qdiscs, attachment.ifindex);
        let before = lock(&self.inner.filters).before(
            attachment.program,
            attachment.ifindex,
            parent,
            &qdiscs,
        );
        let before = before.map_err(|error| chain(&error))?;
        let names = |filters: Vec<Filter>| {
            // Some kinds report one filter in several parts.
            let mut names: Vec<String> = filters.iter().map(name_of_filter).collect();
            names.dedup();
            names
        };
        Ok(before.map(names))
    }
}

impl HookView {
    /// The view of a program that is not attached.
    fn gone(attachment: &Attachment) -> Self {
        Self {
            program: attachment.program,
            hook: attachment.hook,
            side: attachment.program.side(),
            qdisc: None,
            before: Vec::new(),
            is_there: false,
        }
    }
}

fn name_of(program: &ProgramInfo) -> String {
    let name = program.name_as_str().filter(|name| !name.is_empty());
    format!("{} (program {})", name.unwrap_or("?"), program.id())
}

/// Name of a program, or only its identifier without `CAP_SYS_ADMIN`.
fn label(id: u32) -> String {
    let found = loaded_programs().flatten().find(|info| info.id() == id);
    found.map_or_else(|| format!("? (program {id})"), |info| name_of(&info))
}

fn name_of_filter(filter: &Filter) -> String {
    let name = match &filter.program {
        Some(program) if !program.name.is_empty() => &program.name,
        _ => &filter.kind,
    };
    format!("{name} (preference {})", filter.preference)
}

fn qdisc(parent: Parent, qdiscs: &Qdiscs) -> String {
    match parent {
        Parent::Ingress => "ingress".to_owned(),
        Parent::Clsact(_) => "clsact".to_owned(),
        Parent::Root { handle } => {
            let root = qdiscs.root.as_ref().filter(|root| root.handle == handle);
            let kind = root.map_or("root", |root| &root.kind);
            format!("{kind} {:x}:", handle >> 16)
        }
    }
}
