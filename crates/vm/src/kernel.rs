//! The guest's kernel command line. `dorm.*` parameters are read by `dorm-init`; its module documentation lists them.

use crate::address::{DNS_V4, GATEWAY_V4, GATEWAY_V6, GUEST_V4, GUEST_V6};
use crate::config::{NetworkKind, VmConfig};
use crate::probe::Acceleration;

/// What every guest boots with: text on the serial port; a panic at the first fault of the kernel, which would else live on
/// and answer nobody; and a triple fault instead of a reboot, because the VM is to
/// end then (`-no-reboot`) and no other way of resetting is as quick.
const ALWAYS: &str =
    "console=ttyS0 quiet reboot=t oops=panic panic=-1 nowatchdog no_timer_check random.trust_cpu=on";

/// Under emulation the guest's own defences against speculative execution guard nothing and cost time.
const EMULATED: &str = "mitigations=off cpuidle.off=1";

/// The command line of `config`'s guest.
#[must_use]
pub fn kernel_command_line(config: &VmConfig, acceleration: &Acceleration) -> String {
    let mut line = ALWAYS.to_owned();
    if !acceleration.is_kvm() {
        line.push(' ');
        line.push_str(EMULATED);
    }
    line.push_str(" dorm.hostname=");
    line.push_str(&config.hostname);
    if let Some(lonely) = config.lonely_after {
        line.push_str(&format!(" dorm.lonely={}", lonely.as_secs()));
    }
    if config.network != NetworkKind::None {
        line.push_str(&format!(
            " dorm.ip4={GUEST_V4} dorm.gw4={GATEWAY_V4} dorm.ip6={GUEST_V6} dorm.gw6={GATEWAY_V6} dorm.dns={DNS_V4}"
        ));
    }
    line
}
