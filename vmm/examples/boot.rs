//! Boots a kernel, prints what its serial port says, and ends the VM after some seconds if it does not
//! end by itself: `boot KERNEL [SECONDS]`.

use std::error::Error;
use std::thread;
use std::time::Duration;

use vmm::VmBuilder;
use vmm::api::{CpusConfig, MemoryConfig, Output, Part, PayloadConfig, VmConfig};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let kernel = arguments.next().ok_or("usage: boot KERNEL [SECONDS]")?;
    let seconds = arguments.next().map_or(Ok(10), |seconds| seconds.parse())?;

    // A part is a struct, or read as on podvmm's command line.
    let config = VmConfig {
        payload: PayloadConfig {
            kernel: kernel.into(),
            cmdline: "console=ttyS0 panic=-1".into(),
            ..PayloadConfig::default()
        },
        cpus: CpusConfig::from_options("boot=1,max=2")?,
        memory: MemoryConfig::from_options("size=256M")?,
        serial: Output::Tty,
        ..VmConfig::default()
    };
    let mut vm = VmBuilder::new().boot(config)?;

    let handle = vm.handle();
    thread::spawn(move || {
        thread::sleep(Duration::from_secs(seconds));
        // It may have ended by then, and is asked no more.
        let _ = handle.end();
    });
    let ending = vm.run();
    println!("\n{ending}");
    Ok(())
}
