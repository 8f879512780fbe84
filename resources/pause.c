/* The first process of a pod's sandbox: reaps what it inherits until it is told to end. */
#include <signal.h>
#include <stddef.h>
#include <sys/wait.h>

int main(void)
{
	sigset_t awaited;
	int signal;

	/* Blocked, not handled: the kernel drops what the first process of a namespace has no handler for. */
	sigemptyset(&awaited);
	sigaddset(&awaited, SIGCHLD);
	sigaddset(&awaited, SIGINT);
	sigaddset(&awaited, SIGTERM);
	sigprocmask(SIG_BLOCK, &awaited, NULL);
	for (;;) {
		if (sigwait(&awaited, &signal) == 0 && signal != SIGCHLD)
			return 0;
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
	}
}
