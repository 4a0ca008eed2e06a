//! Seccomp filters for the restrictions of a unit.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, anyhow};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use serde::{Deserialize, Serialize};

use super::{Unit, calls};

/// Flags of `clone` that create namespaces.
const NAMESPACES: [libc::c_int; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];
/// Socket families that the project's units name.
const FAMILIES: [(&str, libc::c_int); 5] = [
    ("AF_UNIX", libc::AF_UNIX),
    ("AF_INET", libc::AF_INET),
    ("AF_INET6", libc::AF_INET6),
    ("AF_NETLINK", libc::AF_NETLINK),
    ("AF_PACKET", libc::AF_PACKET),
];

/// System calls that return an error, as under the unit, instead of killing the process. libvirt's
/// library loads libnuma, which tries `set_mempolicy` on loading and does not need it.
const DISPENSABLE: [(&str, libc::c_long); 1] = [("set_mempolicy", libc::SYS_set_mempolicy)];

/// Restrictions of a unit that seccomp enforces; the outer stage writes them for the inner stage.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Filter {
    /// Permitted system calls; `None`: all calls.
    calls: Option<Vec<String>>,
    /// Permitted socket families; `None`: all families.
    families: Option<Vec<libc::c_int>>,
    namespaces: bool,
    personality: bool,
    writable_code: bool,
}

impl Filter {
    pub(super) fn of(unit: &Unit) -> Result<Self> {
        let families = unit.words("RestrictAddressFamilies").into_iter();
        let families: Vec<libc::c_int> = families
            .map(|name| {
                let known = FAMILIES.iter().find(|(known, _)| *known == name);
                let (_, number) = known.with_context(|| format!("There is no {name}"))?;
                Ok(*number)
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            calls: calls::permitted(unit)?.map(|calls| calls.into_iter().collect()),
            families: (!families.is_empty()).then_some(families),
            namespaces: !unit.is_set("RestrictNamespaces"),
            personality: !unit.is_set("LockPersonality"),
            writable_code: !unit.is_set("MemoryDenyWriteExecute"),
        })
    }

    /// Installs the filters for this process and all programs that it executes.
    pub(super) fn apply(&self) -> Result<()> {
        if let Some(families) = &self.families {
            let others = families.iter().map(|family| {
                let family = u64::from(family.cast_unsigned());
                condition(0, SeccompCmpOp::Ne, family)
            });
            let rule = SeccompRule::new(others.collect::<Result<_>>()?)?;
            refuse([(libc::SYS_socket, vec![rule])].into(), libc::EAFNOSUPPORT)?;
        }
        refuse(self.refused()?, libc::EPERM)?;
        if !self.namespaces {
            // Filters cannot see the flags of `clone3`, which are in memory. After this error the
            // caller falls back to `clone`.
            refuse([(libc::SYS_clone3, Vec::new())].into(), libc::ENOSYS)?;
        }
        let Some(calls) = &self.calls else {
            return Ok(());
        };
        // The first filter makes dispensable calls return an error. The second filter kills, so it
        // must permit these calls.
        let dispensable = || {
            let refused = |name: &str| !calls.iter().any(|call| call == name);
            DISPENSABLE.iter().filter(move |(name, _)| refused(name))
        };
        let rules = dispensable().map(|(_, number)| (*number, Vec::new()));
        refuse(rules.collect(), libc::EPERM)?;
        let names = dispensable().map(|(name, _)| (*name).to_owned());
        let permitted: Vec<String> = calls.iter().cloned().chain(names).collect();
        apply(&permit(&permitted)?)
    }

    fn refused(&self) -> Result<BTreeMap<libc::c_long, Vec<SeccompRule>>> {
        let mut refused = BTreeMap::new();
        if !self.writable_code {
            let both = libc::PROT_WRITE | libc::PROT_EXEC;
            refused.insert(libc::SYS_mmap, vec![with_all(2, both)?]);
            for call in [libc::SYS_mprotect, libc::SYS_pkey_mprotect] {
                refused.insert(call, vec![with_all(2, libc::PROT_EXEC)?]);
            }
        }
        if !self.namespaces {
            let flags = || NAMESPACES.into_iter().map(|flag| with_all(0, flag));
            refused.insert(libc::SYS_clone, flags().collect::<Result<_>>()?);
            refused.insert(libc::SYS_unshare, flags().collect::<Result<_>>()?);
            refused.insert(libc::SYS_setns, Vec::new());
        }
        if !self.personality {
            let other = condition(0, SeccompCmpOp::Ne, 0)?;
            refused.insert(libc::SYS_personality, vec![SeccompRule::new(vec![other])?]);
        }
        Ok(refused)
    }
}

fn condition(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompCondition> {
    let length = SeccompCmpArgLen::Dword;
    Ok(SeccompCondition::new(argument, length, operator, value)?)
}

/// Returns a rule that matches an argument with all of these flags.
fn with_all(argument: u8, flags: libc::c_int) -> Result<SeccompRule> {
    let flags = u64::from(flags.cast_unsigned());
    let condition = condition(argument, SeccompCmpOp::MaskedEq(flags), flags)?;
    Ok(SeccompRule::new(vec![condition])?)
}

fn refuse(rules: BTreeMap<libc::c_long, Vec<SeccompRule>>, errno: libc::c_int) -> Result<()> {
    if rules.is_empty() {
        return Ok(());
    }
    let action = SeccompAction::Errno(errno.cast_unsigned());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, action, architecture()?)?;
    apply(&BpfProgram::try_from(filter)?)
}

/// Returns a filter that kills the process on any other call.
fn permit(calls: &[String]) -> Result<BpfProgram> {
    // systemd's lists also contain calls of other architectures.
    let known: Vec<&String> = calls
        .iter()
        .filter(|call| compile(&[call]).is_ok())
        .collect();
    compile(&known)
}

fn compile(calls: &[&String]) -> Result<BpfProgram> {
    let calls: Vec<_> = calls
        .iter()
        .map(|call| serde_json::json!({"syscall": call}))
        .collect();
    let text = serde_json::json!({"calls": {
        "mismatch_action": "kill_process",
        "match_action": "allow",
        "filter": calls,
    }});
    let programs = seccompiler::compile_from_json(text.to_string().as_bytes(), architecture()?)?;
    let program = programs.into_values().next();
    program.context("The filter of system calls is empty")
}

fn architecture() -> Result<TargetArch> {
    let name = std::env::consts::ARCH;
    TargetArch::try_from(name)
        .map_err(|_| anyhow!("No filters of system calls are made for {name}"))
}

fn apply(program: &BpfProgram) -> Result<()> {
    seccompiler::apply_filter(program).context("The kernel refuses a filter of system calls")
}
