// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Process 1 of the lab: loads modules, lays an overlay over the host's root,
 * loads the driver, keeps one agent per virtio port, powers off when unused.
 *
 * Kernel command line: kernweave.ports=N, kernweave.idle=SECONDS without any
 * host session, kernweave.cap=SECONDS in all, kernweave.watchdog=SECONDS until
 * the machine is ended from outside because process 1 does not run any more.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <linux/watchdog.h>
#include <net/if.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "agent.h"

#define MAX_PORTS	16

static int kmsg = -1, agent_fd = -1, shared_fd = -1, driver_fd = -1, watchdog_fd = -1;
static struct kw_port *shared;
static char nodes[MAX_PORTS][40];
static pid_t agents[MAX_PORTS];
static long ports = 8, idle_s = 900, cap_s = 8 * 3600;
static long watchdog_s = 120;	/* a host under load may keep a sound guest waiting for long */

/* To the kernel log, so that it keeps its place among the kernel's own lines. */
static void say(const char *format, ...)
{
	char line[300] = "<5>kernweave: ";
	size_t head = strlen(line);
	va_list args;
	int n;

	va_start(args, format);
	n = vsnprintf(line + head, sizeof(line) - head - 1, format, args);
	va_end(args);
	strcat(line, "\n");	/* without it the line waits for a continuation */
	if (n < 0 || write(kmsg, line, strlen(line)) < 0)
		return;
}

static void power_off(const char *why)
{
	say("power off: %s", why);
	sync();
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

static void must(int failed, const char *what)
{
	if (!failed)
		return;
	say("cannot %s: %s", what, strerror(errno));
	power_off("the lab cannot be set up");
}

static void mount_on(const char *type, const char *source, const char *dir, const char *data)
{
	mkdir(dir, 0755);
	if (mount(source, dir, type, 0, data))
		say("cannot mount %s on %s: %s", type, dir, strerror(errno));
}

static void read_options(void)
{
	char line[4096] = "", *word, *save;
	int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);

	if (fd < 0 || read(fd, line, sizeof(line) - 1) < 0)
		return;
	close(fd);
	for (word = strtok_r(line, " \n", &save); word; word = strtok_r(NULL, " \n", &save)) {
		sscanf(word, "kernweave.ports=%ld", &ports);
		sscanf(word, "kernweave.idle=%ld", &idle_s);
		sscanf(word, "kernweave.cap=%ld", &cap_s);
		sscanf(word, "kernweave.watchdog=%ld", &watchdog_s);
	}
	if (ports > MAX_PORTS)
		ports = MAX_PORTS;
}

static int load(int fd)
{
	return fd >= 0 && syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST ? -1 : 0;
}

/* In the order of their names. */
static void load_modules(const char *dir)
{
	struct dirent **names;
	char path[300];
	int n = scandir(dir, &names, NULL, alphasort), i, fd;

	for (i = 0; i < n; i++) {
		if (names[i]->d_name[0] == '.')
			continue;
		snprintf(path, sizeof(path), "%s/%s", dir, names[i]->d_name);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		if (load(fd))
			say("cannot load %s: %s", names[i]->d_name, strerror(errno));
		close(fd);
	}
}

/* The host's root read-only below, memory above, and nothing else of the host's. */
static void enter_root(void)
{
	mkdir("/host", 0755);
	must(mount("host", "/host", "9p", MS_RDONLY,
		   "trans=virtio,version=9p2000.L,cache=loose,msize=512000"),
	     "mount the host's root");
	mount_on("tmpfs", "tmpfs", "/memory", "mode=755");
	mkdir("/memory/upper", 0755);
	mkdir("/memory/work", 0755);
	mkdir("/root", 0755);
	must(mount("overlay", "/root", "overlay", 0,
		   "lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work"),
	     "mount the overlay");
	must(chdir("/root") || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"),
	     "enter the root");
	mount_on("proc", "proc", "/proc", NULL);
	mount_on("sysfs", "sysfs", "/sys", NULL);
	mount_on("devtmpfs", "devtmpfs", "/dev", NULL);
	mount_on("devpts", "devpts", "/dev/pts", "mode=620,ptmxmode=666");
	mount_on("tmpfs", "tmpfs", "/dev/shm", "mode=1777");
	mount_on("tmpfs", "tmpfs", "/tmp", "mode=1777");
	mount_on("tmpfs", "tmpfs", "/run", "mode=755");
	mount_on("debugfs", "debugfs", "/sys/kernel/debug", NULL);
	mount_on("tracefs", "tracefs", "/sys/kernel/tracing", NULL);
}

static void dress_up(void)
{
	struct ifreq lo = { .ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING };
	int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (s < 0 || ioctl(s, SIOCSIFFLAGS, &lo))
		say("cannot bring up lo: %s", strerror(errno));
	close(s);
	if (sethostname("kernweave-lab", strlen("kernweave-lab")))
		say("cannot set the host name: %s", strerror(errno));
	symlink("/proc/self/fd", "/dev/fd");
	symlink("/proc/self/fd/0", "/dev/stdin");
	symlink("/proc/self/fd/1", "/dev/stdout");
	symlink("/proc/self/fd/2", "/dev/stderr");
	if (driver_fd >= 0 && load(driver_fd))
		say("cannot load kernweave.ko: %s", strerror(errno));
	close(driver_fd);
}

static void start_agent(int i)
{
	char fd[12], index[12];
	char *argv[] = { "kw-agent", nodes[i], fd, index, NULL }, *env[] = { NULL };
	sigset_t none;

	shared[i].connected = 0;
	agents[i] = fork();
	if (agents[i])
		return;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	setsid();
	snprintf(fd, sizeof(fd), "%d", shared_fd);
	snprintf(index, sizeof(index), "%d", i);
	fcntl(shared_fd, F_SETFD, 0);
	syscall(SYS_execveat, agent_fd, "", argv, env, AT_EMPTY_PATH);
	say("cannot start an agent: %s", strerror(errno));
	_exit(1);
}

/* Notes the nodes of the ports named kernweave.N; returns how many there are now. */
static int find_ports(void)
{
	DIR *dir = opendir("/sys/class/virtio-ports");
	struct dirent *entry;
	char path[300], name[40];
	int found = 0, i, fd;

	while (dir && (entry = readdir(dir))) {
		snprintf(path, sizeof(path), "/sys/class/virtio-ports/%s/name", entry->d_name);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		memset(name, 0, sizeof(name));
		if (fd < 0)
			continue;
		if (read(fd, name, sizeof(name) - 1) > 0 &&
		    sscanf(name, "kernweave.%d", &i) == 1 && i >= 0 && i < ports) {
			snprintf(nodes[i], sizeof(nodes[i]), "/dev/%.32s", entry->d_name);
			found += !access(nodes[i], F_OK);
		}
		close(fd);
	}
	if (dir)
		closedir(dir);
	return found;
}

/* Their driver makes them in its own time. */
static void wait_ports(void)
{
	int tries;

	for (tries = 0; find_ports() < ports; tries++) {
		must(tries == 2000, "find the virtio ports");
		usleep(5000);
	}
}

static void start_agents(void)
{
	int i;

	shared_fd = syscall(SYS_memfd_create, "kernweave", 1 /* MFD_CLOEXEC */);
	must(shared_fd < 0 || ftruncate(shared_fd, 4096), "make shared memory");
	shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, shared_fd, 0);
	must(shared == MAP_FAILED, "map shared memory");
	for (i = 0; i < ports; i++)
		start_agent(i);
}

static void reap(void)
{
	pid_t pid;
	int i;

	while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
		for (i = 0; i < ports; i++)
			if (agents[i] == pid)
				start_agent(i);
}

static int in_use(void)
{
	int i;

	for (i = 0; i < ports; i++)
		if (shared[i].connected)
			return 1;
	return 0;
}

static void start_watchdog(void)
{
	int seconds = watchdog_s;

	watchdog_fd = open("/dev/watchdog", O_WRONLY | O_CLOEXEC);
	if (watchdog_fd < 0 || ioctl(watchdog_fd, WDIOC_SETTIMEOUT, &seconds))
		say("no watchdog: %s", strerror(errno));
}

static void stroke_watchdog(void)
{
	if (watchdog_fd >= 0 && write(watchdog_fd, "", 1) < 0)
		return;
}

static void watch(const sigset_t *sigchld)
{
	struct timespec tick = { .tv_sec = 1 }, now;
	time_t used;

	clock_gettime(CLOCK_BOOTTIME, &now);
	for (used = now.tv_sec;;) {
		sigtimedwait(sigchld, NULL, &tick);
		stroke_watchdog();
		reap();
		clock_gettime(CLOCK_BOOTTIME, &now);
		if (in_use())
			used = now.tv_sec;
		if (now.tv_sec - used >= idle_s)
			power_off("idle");
		if (now.tv_sec >= cap_s)
			power_off("the time cap is reached");
	}
}

int main(void)
{
	sigset_t sigchld;
	int null, i;

	sigemptyset(&sigchld);
	sigaddset(&sigchld, SIGCHLD);
	sigprocmask(SIG_BLOCK, &sigchld, NULL);
	mount_on("proc", "proc", "/proc", NULL);
	mount_on("sysfs", "sysfs", "/sys", NULL);
	mount_on("devtmpfs", "devtmpfs", "/dev", NULL);
	null = open("/dev/null", O_RDWR);
	for (i = 0; i < 3; i++)
		dup2(null, i);
	if (null > 2)
		close(null);
	kmsg = open("/dev/kmsg", O_WRONLY | O_CLOEXEC);
	read_options();
	agent_fd = open("/agent", O_RDONLY | O_CLOEXEC);
	driver_fd = open("/kernweave.ko", O_RDONLY | O_CLOEXEC);
	load_modules("/modules");
	enter_root();
	dress_up();
	wait_ports();
	start_agents();
	say("GUEST-UP");
	start_watchdog();
	watch(&sigchld);
}
