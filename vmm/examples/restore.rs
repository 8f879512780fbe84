//! Boots a kernel, takes a snapshot of it, ends it, and restores another VM from the snapshot:
//! `restore KERNEL FOLDER`.

use std::error::Error;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use vmm::api::{ApiError, PayloadConfig, Restore, Snapshot, VmConfig};
use vmm::{Handle, VmBuilder};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(kernel), Some(folder)) = (arguments.next(), arguments.next()) else {
        return Err("usage: restore KERNEL FOLDER".into());
    };
    let folder = PathBuf::from(folder);
    let config = VmConfig {
        payload: PayloadConfig {
            kernel: kernel.into(),
            ..PayloadConfig::default()
        },
        ..VmConfig::default()
    };

    // A VM is asked from another thread than the one that runs it.
    let mut first = VmBuilder::new().boot(config)?;
    let (handle, to) = (first.handle(), folder.clone());
    let taken = thread::spawn(move || take_snapshot(&handle, to));
    println!("the first VM: {}", first.run());
    taken.join().expect("it does not panic")?;

    let mut restore = Restore::new(folder);
    restore.resume = true;
    let mut second = VmBuilder::new().restore(restore)?;
    let handle = second.handle();
    let asked = thread::spawn(move || -> Result<_, ApiError> {
        let info = handle.info()?;
        handle.end()?;
        Ok(info)
    });
    println!("the second VM: {}", second.run());
    let info = asked.join().expect("it does not panic")?;
    println!("it had {} vCPU and was {}", info.vcpus_actual, info.state);
    Ok(())
}

fn take_snapshot(handle: &Handle, folder: PathBuf) -> Result<(), ApiError> {
    thread::sleep(Duration::from_millis(100));
    handle.pause()?;
    handle.snapshot(Snapshot {
        folder,
        incremental: false,
    })?;
    handle.end()
}
